rule prompts:
    output:
        table="<results>/prompts/{set}.parquet",
        pictures=directory("<results>/prompts/{set}"),
    log:
        "<logs>/prompts/{set}.log",
    benchmark:
        "<benchmarks>/prompts/{set}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=30,
    params:
        config=CONFIG,
        settings=settings("prompts/{set}"),
        code=code_hash("prompts"),
    shell:
        "ecodiff prompts {output.table:q} --pictures {output.pictures:q}"
        " --config {params.config:q} --set {wildcards.set} > {log:q} 2>&1"
