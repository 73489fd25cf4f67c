# Learned masks, one for each sparsity or one for all.
rule mask:
    input:
        model=of(plan.dense_files),
        calibration=of(plan.mask_data),
    output:
        mask="<results>/{model}/masks/{mask}/mask.safetensors",
        history="<results>/{model}/masks/{mask}/history.csv",
    log:
        "<logs>/{model}/mask/{mask}.log",
    benchmark:
        "<benchmarks>/{model}/mask/{mask}.tsv"
    wildcard_constraints:
        mask=one_of(plan.masks(learned=True)),
    priority: 1
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        gpu=gpus(launched=True),
        mem_mb=resource("mem_mb"),
        runtime=resource("runtime"),
    params:
        config=CONFIG,
        source=of(plan.source),
        load=settings("models/{model}/load"),
        mask=lambda wildcards: plan.mask_settings(wildcards.model, wildcards.mask).model_dump(),
        aim=of(plan.aim),
        launch=launch,
        code=code_hash("mask"),
    shell:
        "{params.launch}ecodiff mask {params.source:q} {output.mask:q} {params.aim:q}"
        " --config {params.config:q} --model {wildcards.model} --calibration {input.calibration:q} --history {output.history:q}"
        " > {log:q} 2>&1"


# Other methods score all units at once, for all sparsities.
rule baseline:
    input:
        model=of(plan.dense_files),
        calibration=of(plan.mask_data),
    output:
        "<results>/{model}/masks/{mask}/mask.safetensors",
    log:
        "<logs>/{model}/mask/{mask}.log",
    benchmark:
        "<benchmarks>/{model}/mask/{mask}.tsv"
    wildcard_constraints:
        mask=one_of(plan.masks(learned=False)),
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
        mask=lambda wildcards: plan.mask_settings(wildcards.model, wildcards.mask).model_dump(),
        aim=of(plan.aim),
        calibration=each("--calibration", "calibration"),
        code=code_hash("mask"),
    shell:
        "ecodiff mask {params.source:q} {output:q} {params.aim:q}"
        " --config {params.config:q} --model {wildcards.model} {params.calibration:q} > {log:q} 2>&1"


rule masks:
    input:
        plan.all_masks(),
