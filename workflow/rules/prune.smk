rule prune:
    input:
        unpack(of(plan.compensation)),
        model=of(plan.dense_files),
        mask=of(plan.mask),
    output:
        directory("<results>/{model}/{variant}/model"),
    log:
        "<logs>/{model}/prune/{variant}.log",
    benchmark:
        "<benchmarks>/{model}/prune/{variant}.tsv"
    wildcard_constraints:
        variant=one_of(variant.pruned.name for _, variant in plan.pruned),
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        gpu=gpus(),
        mem_mb=resource("mem_mb"),
        runtime=resource("runtime"),
    params:
        config=CONFIG,
        source=of(plan.source_of_dense),
        load=settings("models/{model}/load"),
        percent=of(plan.percent),
        grams=each("--grams", "grams"),
        calibration=each("--calibration", "calibration"),
        settings=settings("prune"),
        code=code_hash("prune"),
    shell:
        "ecodiff prune {params.source:q} {input.mask:q} {output:q}"
        " --percent {params.percent} --config {params.config:q} --model {wildcards.model}"
        " {params.grams:q} {params.calibration:q} > {log:q} 2>&1"


rule pruned:
    input:
        [plan.source(model, variant.name) for model, variant in plan.pruned],
