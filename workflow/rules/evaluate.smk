# One job a model: networks, texts and real images are read once for all of its variants.
rule quality:
    input:
        prompts=f"<results>/prompts/{run.evaluate.prompts}.parquet",
        pictures=f"<results>/prompts/{run.evaluate.prompts}",
        images=shards_of_variants,
        clip=clip_files(),
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
        gpu=resource("gpu"),
        mem_mb=8000,
        runtime=resource("runtime"),
    params:
        settings=quality_settings(),
        variants=names_and_shards,
        code=code_hash("evaluate.quality"),
    shell:
        "ecodiff evaluate quality {input.prompts} {output} {params.variants}"
        " --settings {params.settings:q} > {log} 2>&1"


# All variants take turns in one process, so that ratios are of one run; it takes all cores, so
# that it runs alone.
rule efficiency:
    input:
        model=dense_files,
        variants=folders_of,
        prompts=f"<results>/prompts/{run.evaluate.prompts}.parquet",
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
        gpu=resource("gpu"),
        mem_mb=resource("mem_mb"),
        runtime=resource("runtime"),
    params:
        variants=names_and_sources,
        load=settings("models/{model}/load"),
        call=settings("models/{model}/call"),
        settings=settings("evaluate/efficiency"),
        code=code_hash("evaluate.efficiency"),
    shell:
        "ecodiff evaluate efficiency {input.prompts} {output} {params.variants} --load {params.load:q}"
        " --call {params.call:q} --settings {params.settings:q} > {log} 2>&1"


# What a learning iteration costs; alone as well.
rule mask_cost:
    input:
        model=dense_files,
        prompts=f"<results>/prompts/{run.calibrate.prompts}.parquet",
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
        gpu=resource("gpu"),
        mem_mb=resource("mem_mb"),
        runtime=resource("runtime"),
    params:
        source=lookup(dpath="models/{model}/source", within=config),
        load=settings("models/{model}/load"),
        call=settings("models/{model}/call"),
        settings=settings("evaluate/mask_cost"),
        code=code_hash("evaluate.mask_cost"),
    shell:
        "ecodiff evaluate mask-cost {params.source} {input.prompts} {output} --load {params.load:q}"
        " --call {params.call:q} --settings {params.settings:q} > {log} 2>&1"
