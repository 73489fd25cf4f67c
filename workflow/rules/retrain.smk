rule retrain:
    input:
        model=dense_files,
        pruned=pruned_of,
        data=retraining_data,
    output:
        directory("<results>/{model}/{variant}/model"),
    log:
        "<logs>/{model}/retrain/{variant}.log",
    benchmark:
        "<benchmarks>/{model}/retrain/{variant}.tsv"
    wildcard_constraints:
        variant=one_of(v.name for _, v in PRUNED if v.retrain),
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        gpu=resource("gpu"),
        mem_mb=resource("mem_mb"),
        runtime=resource("runtime"),
    params:
        dense=lookup(dpath="models/{model}/source", within=config),
        load=settings("models/{model}/load"),
        settings=lambda wildcards: retraining_of(wildcards).model_dump_json(),
        code=code_hash("retrain"),
    shell:
        "ecodiff retrain {input.pruned} {input.data} {output} --load {params.load:q}"
        " --dense {params.dense} --settings {params.settings:q} > {log} 2>&1"
