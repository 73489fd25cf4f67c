rule tables:
    input:
        quality=plan.judged(),
        pruned=plan.all_pruned(),
        efficiency=plan.of_models("efficiency.json") if plan.config.evaluate.efficiency else [],
        published=plan.config.report.published or [],
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
        config=CONFIG,
        shown=[settings(part) for part in ("variants", "evaluate", "report")],
        code=code_hash("report.tables"),
    shell:
        "ecodiff report tables $(dirname {params.config:q}) > {log:q} 2>&1"


rule figures:
    input:
        quality=plan.judged(),
        pruned=plan.all_pruned(),
        efficiency=plan.of_models("efficiency.json") if plan.config.evaluate.efficiency else [],
        mask_cost=plan.of_models("mask_cost.csv") if plan.config.evaluate.mask_cost else [],
    output:
        report(
            expand(
                "<results>/figures/{figure}-{model}.png",
                figure=plan.figures(),
                model=plan.config.models,
            ),
            caption="../report/figures.rst",
            category="Figures",
        ),
        expand(
            "<results>/figures/{figure}-{model}.pdf",
            figure=plan.figures(),
            model=plan.config.models,
        ),
    log:
        "<logs>/figures.log",
    benchmark:
        "<benchmarks>/figures.tsv"
    conda:
        "../../environment.yml"
    params:
        config=CONFIG,
        shown=[settings(part) for part in ("variants", "evaluate", "report")],
        only=[word for figure in plan.figures() for word in ("--only", figure)],
        code=code_hash("report.figures"),
    shell:
        "ecodiff report figures $(dirname {params.config:q}) {params.only:q} > {log:q} 2>&1"
