# Learned masks, one for each sparsity or one for all.
rule mask:
    input:
        model=dense_files,
        calibration=calibration,
    output:
        mask="<results>/{model}/masks/{mask}/mask.safetensors",
        history="<results>/{model}/masks/{mask}/history.csv",
    log:
        "<logs>/{model}/mask/{mask}.log",
    benchmark:
        "<benchmarks>/{model}/mask/{mask}.tsv"
    wildcard_constraints:
        mask=one_of(v.mask for _, v in PRUNED if v.method in LEARNED),
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
        method=method_of,
        percent=lambda wildcards: Variant.parse(wildcards.mask).percent,
        settings=mask_settings,
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
        calibration=lambda wildcards: (
            [] if method_of(wildcards) in BLIND else calibration(wildcards)
        ),
    output:
        "<results>/{model}/masks/{mask}/mask.safetensors",
    log:
        "<logs>/{model}/mask/{mask}.log",
    benchmark:
        "<benchmarks>/{model}/mask/{mask}.tsv"
    wildcard_constraints:
        mask=one_of(v.mask for _, v in PRUNED if v.method not in LEARNED),
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
        method=method_of,
        percent=lambda wildcards: Variant.parse(wildcards.mask).percent,
        settings=mask_settings,
        calibration=each("--calibration", "calibration"),
        code=code_hash("mask"),
    shell:
        "ecodiff mask {params.source} {output} --load {params.load:q} --method {params.method}"
        " --percent {params.percent} --settings {params.settings:q} {params.calibration}"
        " > {log} 2>&1"


rule masks:
    input:
        all_masks(),
