rule retrain:
    input:
        model=of(plan.dense_files),
        pruned=of(plan.before_retraining),
        data=of(plan.retraining_data),
    output:
        directory("<results>/{model}/{variant}/model"),
    log:
        "<logs>/{model}/retrain/{variant}.log",
    benchmark:
        "<benchmarks>/{model}/retrain/{variant}.tsv"
    wildcard_constraints:
        variant=one_of(variant.name for _, variant in plan.pruned if variant.retrain),
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        gpu=resource("gpu"),
        mem_mb=resource("mem_mb"),
        runtime=resource("runtime"),
    params:
        config=CONFIG,
        dense=of(plan.source_of_dense),
        load=settings("models/{model}/load"),
        kind=lambda wildcards: plan.retraining(wildcards.model, wildcards.variant).kind,
        settings=lambda wildcards: plan.retraining(wildcards.model, wildcards.variant).model_dump(),
        code=code_hash("retrain"),
    shell:
        "ecodiff retrain {input.pruned:q} {input.data:q} {output:q} --kind {params.kind}"
        " --dense {params.dense:q} --config {params.config:q} --model {wildcards.model} > {log:q} 2>&1"
