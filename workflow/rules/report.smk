# All values of the run, defaults included; what the report reads to know its variants.
rule config:
    output:
        "<results>/config.yaml",
    log:
        "<logs>/config.log",
    params:
        config=config,
    run:
        write_text(output[0], yaml.safe_dump(params.config, sort_keys=False))


rule tables:
    input:
        config="<results>/config.yaml",
        quality=of_models("quality.json"),
        pruned=all_pruned(),
        efficiency=of_models("efficiency.json") if run.evaluate.efficiency else [],
        published=run.report.published or [],
    output:
        report(
            multiext("<results>/tables/main", ".csv", ".md", ".tex"),
            caption="../report/tables.rst",
            category="Tables",
        ),
        report(
            multiext("<results>/tables/ranking", ".csv", ".md"),
            caption="../report/tables.rst",
            category="Tables",
        ),
    log:
        "<logs>/tables.log",
    benchmark:
        "<benchmarks>/tables.tsv"
    conda:
        "../../environment.yml"
    params:
        code=code_hash("report.tables"),
    shell:
        "ecodiff report tables $(dirname {input.config}) > {log} 2>&1"


rule figures:
    input:
        config="<results>/config.yaml",
        quality=of_models("quality.json"),
        pruned=all_pruned(),
        efficiency=of_models("efficiency.json") if run.evaluate.efficiency else [],
        mask_cost=of_models("mask_cost.csv") if run.evaluate.mask_cost else [],
    output:
        report(
            expand("<results>/figures/{figure}-{model}.png", figure=FIGURES, model=run.models),
            caption="../report/figures.rst",
            category="Figures",
        ),
        expand("<results>/figures/{figure}-{model}.pdf", figure=FIGURES, model=run.models),
    log:
        "<logs>/figures.log",
    benchmark:
        "<benchmarks>/figures.tsv"
    conda:
        "../../environment.yml"
    params:
        only=[f"--only {figure}" for figure in FIGURES],
        code=code_hash("report.figures"),
    shell:
        "ecodiff report figures $(dirname {input.config}) {params.only} > {log} 2>&1"
