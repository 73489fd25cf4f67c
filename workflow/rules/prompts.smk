# Prompts that are read from files. An edited file is read anew.
rule prompts:
    input:
        of(plan.prompt_files),
    output:
        table="<results>/prompts/{set}.parquet",
    log:
        "<logs>/prompts/{set}.log",
    benchmark:
        "<benchmarks>/prompts/{set}.tsv"
    wildcard_constraints:
        set=one_of(plan.prompt_sets(drawn=False)),
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=growing(1000),
        runtime=growing(30),
    params:
        config=CONFIG,
        settings=settings("prompts/{set}"),
        code=code_hash("prompts"),
    shell:
        "ecodiff prompts {output.table:q} --config {params.config:q} --set {wildcards.set}"
        " > {log:q} 2>&1"


# Prompts of ShapeWorld, whose true pictures are drawn with them.
use rule prompts as drawn_prompts with:
    output:
        table="<results>/prompts/{set}.parquet",
        pictures=directory("<results>/prompts/{set}"),
    wildcard_constraints:
        set=one_of(plan.prompt_sets(drawn=True)),
