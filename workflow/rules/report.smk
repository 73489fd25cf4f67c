rule tables:
    input:
        quality=plan.judged(),
        pruned=plan.all_pruned(),
        efficiency=plan.of_models("efficiency.json") if plan.config.evaluate.efficiency else [],
        published=plan.config.report.published or [],
    output:
        shown_table("main"),
        shown_table("ranking"),
        multiext("<results>/tables/main", ".md", ".tex"),
        "<results>/tables/ranking.md",
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
        shown_figures(),
        [file for _, _, file in figure_files("pdf")],
    log:
        "<logs>/figures.log",
    benchmark:
        "<benchmarks>/figures.tsv"
    conda:
        "../../environment.yml"
    params:
        config=CONFIG,
        shown=[settings(part) for part in ("variants", "evaluate", "report")],
        code=code_hash("report.figures"),
    shell:
        "ecodiff report figures $(dirname {params.config:q}) > {log:q} 2>&1"


# All pictures, prompt by prompt: a page that any browser opens.
rule gallery:
    input:
        prompts=plan.timed(),
        seen=plan.all_seen(),
        images=plan.all_shards(),
    output:
        "<results>/index.html",
    log:
        "<logs>/gallery.log",
    benchmark:
        "<benchmarks>/gallery.tsv"
    conda:
        "../../environment.yml"
    params:
        config=CONFIG,
        shown=[settings(part) for part in ("variants", "generate/shard_size", "evaluate/prompts")],
        code=code_hash("report.gallery"),
    shell:
        "ecodiff report gallery $(dirname {params.config:q}) > {log:q} 2>&1"
