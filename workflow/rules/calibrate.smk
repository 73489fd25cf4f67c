# One record a model and prompt set, which all masks read. What much else waits for has priority.
rule calibrate:
    input:
        model=of(plan.dense_files),
        prompts="<results>/prompts/{set}.parquet",
    output:
        "<results>/{model}/{set}.safetensors",
    log:
        "<logs>/{model}/calibrate/{set}.log",
    benchmark:
        "<benchmarks>/{model}/calibrate/{set}.tsv"
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
        source=of(plan.source),
        load=settings("models/{model}/load"),
        call=settings("models/{model}/call"),
        batch_size=settings("calibrate/batch_size"),
        code=code_hash("calibrate"),
    shell:
        "ecodiff calibrate {params.source:q} {input.prompts:q} {output:q}"
        " --config {params.config:q} --model {wildcards.model} --batch-size {params.batch_size} > {log:q} 2>&1"


# Only when a variant is compensated.
rule grams:
    input:
        model=of(plan.dense_files),
        calibration=of(plan.calibration),
    output:
        directory("<results>/{model}/grams"),
    log:
        "<logs>/{model}/grams.log",
    benchmark:
        "<benchmarks>/{model}/grams.tsv"
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
        source=of(plan.source),
        load=settings("models/{model}/load"),
        batch_size=settings("calibrate/batch_size"),
        code=code_hash("calibrate"),
    shell:
        "ecodiff grams {params.source:q} {input.calibration:q} {output:q}"
        " --config {params.config:q} --model {wildcards.model} > {log:q} 2>&1"
