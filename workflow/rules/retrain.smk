# What the dense model reads and predicts at each step, once for all variants that learn from it.
rule trajectory:
    input:
        model=of(plan.dense_files),
        prompts="<results>/prompts/{set}.parquet",
    output:
        directory("<results>/{model}/trajectories/{set}-{batch}{at}/{shard}"),
    log:
        "<logs>/{model}/trajectory/{set}-{batch}{at}-{shard}.log",
    benchmark:
        "<benchmarks>/{model}/trajectory/{set}-{batch}{at}-{shard}.tsv"
    wildcard_constraints:
        batch=r"\d+",
        at="(-pictures)?",
    priority: 1
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        gpu=gpus(),
        mem_mb=resource("mem_mb"),
        runtime=resource("runtime"),
    params:
        config=CONFIG,
        source=of(plan.source_of_dense),
        load=settings("models/{model}/load"),
        call=settings("models/{model}/call"),
        shard_size=settings("generate/shard_size"),
        leader=each("--leader", "leader"),
        pictures=lambda wildcards: ["--pictures"] if wildcards.get("at") else [],
        code=code_hash("retrain.trajectory"),
    shell:
        "ecodiff trajectory {params.source:q} {input.prompts:q} {output:q}"
        " --config {params.config:q} --model {wildcards.model} --batch-size {wildcards.batch}"
        " --shard {wildcards.shard} --shard-size {params.shard_size} {params.leader:q} {params.pictures:q}"
        " > {log:q} 2>&1"


# What it predicts where a pruned model gets to by itself.
use rule trajectory as own_trajectory with:
    input:
        model=of(plan.dense_files),
        prompts="<results>/prompts/{set}.parquet",
        leader="<results>/{model}/{variant}/model",
    output:
        directory("<results>/{model}/{variant}/trajectories/{set}-{batch}/{shard}"),
    log:
        "<logs>/{model}/own_trajectory/{variant}-{set}-{batch}-{shard}.log",
    benchmark:
        "<benchmarks>/{model}/own_trajectory/{variant}-{set}-{batch}-{shard}.tsv"
    wildcard_constraints:
        batch=r"\d+",
        variant=one_of(variant.pruned.name for _, variant in plan.pruned),


rule retrain:
    input:
        pruned=of(plan.before_retraining),
        data=of(plan.trajectories),
    output:
        directory("<results>/{model}/{variant}/model"),
    log:
        "<logs>/{model}/retrain/{variant}.log",
    benchmark:
        "<benchmarks>/{model}/retrain/{variant}.tsv"
    wildcard_constraints:
        variant=one_of(variant.name for _, variant in plan.pruned if variant.retrain),
    priority: 1
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        gpu=gpus(launched=True),
        mem_mb=resource("mem_mb"),
        runtime=resource("runtime"),
    params:
        config=CONFIG,
        load=settings("models/{model}/load"),
        aim=of(plan.retraining_aim),
        launch=launch,
        settings=lambda wildcards: plan.retraining(wildcards.model, wildcards.variant).model_dump(),
        data=each("--data", "data"),
        code=code_hash("retrain"),
    shell:
        "{params.launch}ecodiff retrain {input.pruned:q} {output:q} {params.data:q} {params.aim:q}"
        " --config {params.config:q} --model {wildcards.model} > {log:q} 2>&1"
