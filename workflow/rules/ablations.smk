# What each setting of mask learning does, varied alone. No part of `all`.
use rule mask as ablation with:
    output:
        mask="<results>/{model}/ablations/{ablation}/mask.safetensors",
        history="<results>/{model}/ablations/{ablation}/history.csv",
    log:
        "<logs>/{model}/ablations/{ablation}.log",
    benchmark:
        "<benchmarks>/{model}/ablations/{ablation}.tsv"
    wildcard_constraints:
        ablation=one_of(name for found in ABLATIONS.values() for name in found),
    params:
        source=lookup(dpath="models/{model}/source", within=config),
        load=settings("models/{model}/load"),
        method="ecodiff",
        percent=lambda wildcards: round(100 * ablation_of(wildcards).sparsity),
        settings=lambda wildcards: ablation_of(wildcards).settings.model_dump_json(
            exclude_none=True
        ),
        launch=launch,
        code=code_hash("mask"),


rule mask_error:
    input:
        model=dense_files,
        record=f"<results>/{{model}}/{run.ablations.prompts}.safetensors",
        masks=masks_of_ablations,
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
        gpu=resource("gpu"),
        mem_mb=resource("mem_mb"),
        runtime=resource("runtime"),
    params:
        source=lookup(dpath="models/{model}/source", within=config),
        load=settings("models/{model}/load"),
        masks=each("--mask", "masks"),
        sparsities=[f"--sparsity {sparsity}" for sparsity in run.ablations.judged_at],
        batch_size=lookup(dpath="calibrate/batch_size", within=config),
        code=code_hash("evaluate.mask_error"),
    shell:
        "ecodiff evaluate mask-error {params.source} {input.record} {output} --load {params.load:q}"
        " {params.masks} {params.sparsities} --batch-size {params.batch_size} > {log} 2>&1"


rule ablations:
    input:
        config="<results>/config.yaml",
        errors=of_models("ablations/mask_error.csv"),
    output:
        report(
            multiext("<results>/tables/ablations", ".csv", ".md"),
            caption="../report/tables.rst",
            category="Tables",
        ),
        report(
            "<results>/figures/ablations.png",
            caption="../report/figures.rst",
            category="Figures",
        ),
        "<results>/figures/ablations.pdf",
    log:
        "<logs>/ablations.log",
    benchmark:
        "<benchmarks>/ablations.tsv"
    conda:
        "../../environment.yml"
    params:
        code=code_hash("report.ablations"),
    shell:
        "ecodiff report ablations $(dirname {input.config}) > {log} 2>&1"
