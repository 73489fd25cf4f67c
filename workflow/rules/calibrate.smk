# One record a model and prompt set, which all masks and retrainings read.
rule calibrate:
    input:
        model=dense_files,
        prompts="<results>/prompts/{set}.parquet",
    output:
        "<results>/{model}/{set}.safetensors",
    log:
        "<logs>/{model}/calibrate/{set}.log",
    benchmark:
        "<benchmarks>/{model}/calibrate/{set}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        gpu=resource("gpu"),
        mem_mb=resource("mem_mb"),
        runtime=resource("runtime"),
    params:
        source=lookup(dpath="models/{model}/source", within=config),
        load=settings("models/{model}/load"),
        call=settings("models/{model}/call"),
        batch_size=lookup(dpath="calibrate/batch_size", within=config),
        code=code_hash("calibrate"),
    shell:
        "ecodiff calibrate {params.source} {input.prompts} {output} --load {params.load:q}"
        " --call {params.call:q} --batch-size {params.batch_size} > {log} 2>&1"


# Only when a variant is compensated.
rule grams:
    input:
        model=dense_files,
        calibration=calibration,
    output:
        "<results>/{model}/grams.safetensors",
    log:
        "<logs>/{model}/grams.log",
    benchmark:
        "<benchmarks>/{model}/grams.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        gpu=resource("gpu"),
        mem_mb=resource("mem_mb"),
        runtime=resource("runtime"),
    params:
        source=lookup(dpath="models/{model}/source", within=config),
        load=settings("models/{model}/load"),
        batch_size=lookup(dpath="calibrate/batch_size", within=config),
        code=code_hash("calibrate"),
    shell:
        "ecodiff grams {params.source} {input.calibration} {output} --load {params.load:q}"
        " --batch-size {params.batch_size} > {log} 2>&1"
