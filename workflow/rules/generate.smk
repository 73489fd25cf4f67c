rule generate:
    input:
        model=of(plan.model_files),
        prompts="<results>/prompts/{set}.parquet",
    output:
        directory("<results>/{model}/{variant}/images/{set}/{shard}"),
    log:
        "<logs>/{model}/generate/{variant}-{set}-{shard}.log",
    benchmark:
        "<benchmarks>/{model}/generate/{variant}-{set}-{shard}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        gpu=gpus(),
        mem_mb=resource("mem_mb"),
        runtime=resource("runtime"),
    params:
        config=CONFIG,
        source=of(plan.source),
        load=settings("models/{model}/load"),
        call=settings("models/{model}/call"),
        batch_size=settings("generate/batch_size"),
        shard_size=settings("generate/shard_size"),
        code=code_hash("generate"),
    shell:
        "ecodiff generate {params.source:q} {input.prompts:q} {output:q}"
        " --config {params.config:q} --model {wildcards.model} --batch-size {params.batch_size}"
        " --shard {wildcards.shard} --shard-size {params.shard_size} > {log:q} 2>&1"
