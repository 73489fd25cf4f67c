rule prune:
    input:
        unpack(compensation_of),
        model=dense_files,
        mask=mask_of,
    output:
        directory("<results>/{model}/{variant}/model"),
    log:
        "<logs>/{model}/prune/{variant}.log",
    benchmark:
        "<benchmarks>/{model}/prune/{variant}.tsv"
    wildcard_constraints:
        variant=one_of(v.pruned.name for _, v in PRUNED),
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
        percent=percent_of,
        data=lambda wildcards: [
            f"--{kind} {path}" for kind, path in compensation_of(wildcards).items()
        ],
        settings=settings("prune"),
        code=code_hash("prune"),
    shell:
        "ecodiff prune {params.source} {input.mask} {output} --load {params.load:q} {params.data}"
        " --percent {params.percent} --settings {params.settings:q} > {log} 2>&1"


rule pruned:
    input:
        [f"<results>/{model}/{variant.name}/model" for model, variant in PRUNED],
