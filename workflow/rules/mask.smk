# Learned masks, one for each sparsity or one for all.
rule mask:
    input:
        model=dense_files,
        calibration=calibration,
    output:
        mask="<results>/{model}/masks/{method}-{percent}/mask.safetensors",
        history="<results>/{model}/masks/{method}-{percent}/history.csv",
    log:
        "<logs>/{model}/mask/{method}-{percent}.log",
    benchmark:
        "<benchmarks>/{model}/mask/{method}-{percent}.tsv"
    wildcard_constraints:
        method=one_of(LEARNED),
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
        method=lambda wildcards: wildcards.method,
        percent=lambda wildcards: wildcards.percent,
        settings=settings("models/{model}/mask"),
        launch=launch,
        code=code_hash("mask"),
    shell:
        "{params.launch}ecodiff mask {params.source} {output.mask} --load {params.load:q}"
        " --method {params.method} --percent {params.percent} --settings {params.settings:q}"
        " --calibration {input.calibration} --history {output.history} > {log} 2>&1"


# Other methods score all units at once, for all sparsities.
rule baseline:
    input:
        model=dense_files,
        calibration=lambda wildcards: [] if wildcards.method in BLIND else calibration(wildcards),
    output:
        "<results>/{model}/masks/{method}-{percent}/mask.safetensors",
    log:
        "<logs>/{model}/mask/{method}-{percent}.log",
    benchmark:
        "<benchmarks>/{model}/mask/{method}-{percent}.tsv"
    wildcard_constraints:
        method=one_of(method for method in METHODS if method not in LEARNED),
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
        settings=settings("models/{model}/mask"),
        calibration=each("--calibration", "calibration"),
        code=code_hash("mask"),
    shell:
        "ecodiff mask {params.source} {output} --load {params.load:q} --method {wildcards.method}"
        " --percent {wildcards.percent} --settings {params.settings:q} {params.calibration}"
        " > {log} 2>&1"


rule masks:
    input:
        all_masks(),
