# What the real pictures look like, cut to the size of a model's: once for all models of that size.
rule real:
    input:
        prompts="<results>/prompts/{set}.parquet",
        learned=of(plan.learned_tables),
        pictures=of(plan.real_pictures),
        clip=plan.clip_files(),
    output:
        "<results>/real/{set}/{width}x{height}/{shard}.safetensors",
    log:
        "<logs>/real/{set}-{width}x{height}-{shard}.log",
    benchmark:
        "<benchmarks>/real/{set}-{width}x{height}-{shard}.tsv"
    wildcard_constraints:
        width=r"\d+",
        height=r"\d+",
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        gpu=max(min(1, model.resources.gpu) for model in plan.config.models.values()),
        mem_mb=growing(6000),
        runtime=growing(max(model.resources.runtime for model in plan.config.models.values())),
    params:
        config=CONFIG,
        settings=[settings(f"evaluate/{key}") for key in SEEN_BY],
        shard_size=settings("generate/shard_size"),
        learned=each("--learned", "learned"),
        code=code_hash("evaluate.shards"),
    shell:
        "ecodiff evaluate real {input.prompts:q} {output:q} {params.learned:q}"
        " --width {wildcards.width} --height {wildcards.height}"
        " --shard {wildcards.shard} --shard-size {params.shard_size}"
        " --config {params.config:q} > {log:q} 2>&1"


# What a variant's pictures look like beside the dense model's: a job a shard, each by itself.
rule see:
    input:
        prompts="<results>/prompts/{set}.parquet",
        images="<results>/{model}/{variant}/images/{set}/{shard}",
        dense="<results>/{model}/dense/images/{set}/{shard}",
        clip=plan.clip_files(),
    output:
        "<results>/{model}/{variant}/seen/{set}/{shard}.safetensors",
    log:
        "<logs>/{model}/see/{variant}-{set}-{shard}.log",
    benchmark:
        "<benchmarks>/{model}/see/{variant}-{set}-{shard}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        gpu=gpus(),
        mem_mb=growing(6000),
        runtime=resource("runtime"),
    params:
        config=CONFIG,
        settings=[settings(f"evaluate/{key}") for key in SEEN_BY],
        shard_size=settings("generate/shard_size"),
        code=code_hash("evaluate.shards"),
    shell:
        "ecodiff evaluate see {input.prompts:q} {input.images:q} {output:q} --dense {input.dense:q}"
        " --shard {wildcards.shard} --shard-size {params.shard_size}"
        " --config {params.config:q} > {log:q} 2>&1"


# The metrics of a variant, from what was seen of its shards and of the real pictures.
rule quality:
    input:
        seen=of(plan.seen),
        real=of(plan.real),
    output:
        "<results>/{model}/{variant}/quality/{set}.json",
    log:
        "<logs>/{model}/quality/{variant}-{set}.log",
    benchmark:
        "<benchmarks>/{model}/quality/{variant}-{set}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        gpu=gpus(),
        mem_mb=growing(3000),
        runtime=resource("runtime"),
    params:
        config=CONFIG,
        resamples=settings("evaluate/resamples"),
        seen=each("--seen", "seen"),
        real=each("--real", "real"),
        code=code_hash("evaluate.quality"),
    shell:
        "ecodiff evaluate quality {output:q} {params.seen:q} {params.real:q}"
        " --config {params.config:q} > {log:q} 2>&1"


# All variants take turns in one process, so that ratios are of one run; it takes all cores, so
# that it runs alone.
rule efficiency:
    input:
        model=of(plan.dense_files),
        variants=of(plan.folders),
        prompts=plan.timed(),
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
