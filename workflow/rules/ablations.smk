# What each setting of mask learning does, varied alone. No part of `all`.
rule ablation:
    input:
        model=of(plan.dense_files),
        calibration=of(plan.calibration),
    output:
        mask="<results>/{model}/ablations/{ablation}/mask.safetensors",
        history="<results>/{model}/ablations/{ablation}/history.csv",
    log:
        "<logs>/{model}/ablations/{ablation}.log",
    benchmark:
        "<benchmarks>/{model}/ablations/{ablation}.tsv"
    wildcard_constraints:
        ablation=one_of(plan.ablation_names()),
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
        mask=lambda wildcards: plan.ablation(
            wildcards.model, wildcards.ablation
        ).settings.model_dump(),
        aim=of(plan.ablation_aim),
        launch=launch,
        code=code_hash("mask"),
    shell:
        "{params.launch}ecodiff mask {params.source:q} {output.mask:q} {params.aim:q}"
        " --config {params.config:q} --model {wildcards.model} --calibration {input.calibration:q} --history {output.history:q}"
        " > {log:q} 2>&1"


rule mask_error:
    input:
        model=of(plan.dense_files),
        record=of(plan.ablation_record),
        masks=of(plan.ablation_masks),
    output:
        "<results>/{model}/ablations/mask_error.csv",
    log:
        "<logs>/{model}/mask_error.log",
    benchmark:
        "<benchmarks>/{model}/mask_error.tsv"
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
        masks=each("--mask", "masks"),
        sparsities=[
            word for share in plan.config.ablations.judged_at for word in ("--sparsity", share)
        ],
        batch_size=settings("calibrate/batch_size"),
        code=code_hash("evaluate.mask_error"),
    shell:
        "ecodiff evaluate mask-error {params.source:q} {input.record:q} {output:q}"
        " --config {params.config:q} --model {wildcards.model} {params.masks:q} {params.sparsities} --batch-size {params.batch_size}"
        " > {log:q} 2>&1"


rule ablations:
    input:
        errors=plan.of_models("ablations/mask_error.csv"),
    output:
        shown(f"{plan.results}/tables/ablations.csv", "ablations", "3 mask"),
        shown(f"{plan.results}/figures/ablations.png", "ablations", "3 mask"),
        "<results>/tables/ablations.md",
        "<results>/figures/ablations.pdf",
    log:
        "<logs>/ablations.log",
    benchmark:
        "<benchmarks>/ablations.tsv"
    conda:
        "../../environment.yml"
    params:
        config=CONFIG,
        shown=[settings(part) for part in ("ablations", "report")],
        code=code_hash("report.ablations"),
    shell:
        "ecodiff report ablations $(dirname {params.config:q}) > {log:q} 2>&1"
