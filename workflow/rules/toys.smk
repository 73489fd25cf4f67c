# Trains the shipped toys anew, from nothing; no other rule depends on it. To use the result, copy
# it to resources/toys, or set a model's `source` to it.
rule toy:
    input:
        vae=lambda wildcards: toy_inputs(wildcards.toy),
    output:
        directory("results/toys/{toy}"),
    log:
        "results/toys/logs/{toy}.log",
    benchmark:
        "results/toys/benchmarks/{toy}.tsv"
    wildcard_constraints:
        toy=one_of(TOYS),
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=growing(3000),
        runtime=growing(240),
    params:
        vae=each("--vae", "vae"),
        code=code_hash("toys.making"),
    shell:
        "ecodiff toys train {wildcards.toy} --out {output:q} {params.vae:q} > {log:q} 2>&1"


rule toys:
    input:
        expand("results/toys/{toy}", toy=TOYS),
