# One job a model: networks, texts and real images are read once for all of its variants.
rule quality:
    input:
        prompts=plan.evaluated(),
        learned=plan.learned_tables(),
        pictures=plan.real_pictures(),
        images=of(plan.shards_of_all),
        clip=plan.clip_files(),
    output:
        "<results>/{model}/quality.json",
    log:
        "<logs>/{model}/quality.log",
    benchmark:
        "<benchmarks>/{model}/quality.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        gpu=gpus(),
        mem_mb=growing(8000),
        runtime=resource("runtime"),
    params:
        config=CONFIG,
        settings=plan.config.evaluate.model_dump(exclude={"prompts", "efficiency", "mask_cost"}),
        variants=of(plan.shards_by_variant),
        learned=each("--learned", "learned"),
        code=code_hash("evaluate.quality"),
    shell:
        "ecodiff evaluate quality {input.prompts:q} {output:q} {params.variants:q}"
        " {params.learned:q}"
        " --config {params.config:q} > {log:q} 2>&1"


# All variants take turns in one process, so that ratios are of one run; it takes all cores, so
# that it runs alone.
rule efficiency:
    input:
        model=of(plan.dense_files),
        variants=of(plan.folders),
        prompts=plan.evaluated(),
    output:
        "<results>/{model}/efficiency.json",
    log:
        "<logs>/{model}/efficiency.log",
    benchmark:
        "<benchmarks>/{model}/efficiency.tsv"
    conda:
        "../../environment.yml"
    threads: all_cores()
    resources:
        gpu=gpus(),
        mem_mb=resource("mem_mb"),
        runtime=resource("runtime"),
    params:
        config=CONFIG,
        variants=of(plan.source_by_variant),
        load=settings("models/{model}/load"),
        call=settings("models/{model}/call"),
        settings=settings("evaluate/efficiency"),
        code=code_hash("evaluate.efficiency"),
    shell:
        "ecodiff evaluate efficiency {input.prompts:q} {output:q} {params.variants:q}"
        " --config {params.config:q} --model {wildcards.model} > {log:q} 2>&1"


# What a learning iteration costs; alone as well.
rule mask_cost:
    input:
        model=of(plan.dense_files),
        prompts=plan.prompts(plan.config.calibrate.prompts),
    output:
        "<results>/{model}/mask_cost.csv",
    log:
        "<logs>/{model}/mask_cost.log",
    benchmark:
        "<benchmarks>/{model}/mask_cost.tsv"
    conda:
        "../../environment.yml"
    threads: all_cores()
    resources:
        gpu=gpus(),
        mem_mb=resource("mem_mb"),
        runtime=resource("runtime"),
    params:
        config=CONFIG,
        source=of(plan.source),
        load=settings("models/{model}/load"),
        call=settings("models/{model}/call"),
        settings=settings("evaluate/mask_cost"),
        code=code_hash("evaluate.mask_cost"),
    shell:
        "ecodiff evaluate mask-cost {params.source:q} {input.prompts:q} {output:q}"
        " --config {params.config:q} --model {wildcards.model} > {log:q} 2>&1"
