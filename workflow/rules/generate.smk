rule generate:
    input:
        model=model_files,
        prompts=f"<results>/prompts/{run.evaluate.prompts}.parquet",
    output:
        directory("<results>/{model}/{variant}/images/{shard}"),
    log:
        "<logs>/{model}/generate/{variant}-{shard}.log",
    benchmark:
        "<benchmarks>/{model}/generate/{variant}-{shard}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        gpu=resource("gpu"),
        mem_mb=resource("mem_mb"),
        runtime=resource("runtime"),
    params:
        source=source_of,
        load=settings("models/{model}/load"),
        call=settings("models/{model}/call"),
        batch_size=lookup(dpath="generate/batch_size", within=config),
        shard_size=lookup(dpath="generate/shard_size", within=config),
        code=code_hash("generate"),
    shell:
        "ecodiff generate {params.source} {input.prompts} {output} --load {params.load:q}"
        " --call {params.call:q} --batch-size {params.batch_size}"
        " --shard {wildcards.shard} --shard-size {params.shard_size} > {log} 2>&1"
