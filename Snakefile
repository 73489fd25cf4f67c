from snakemake.utils import min_version

min_version("9.27")


# The demo, unless --configfile names another run; two runs are never merged.
if not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


# The first page of `snakemake --report`.
report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/prompts.smk"
include: "workflow/rules/calibrate.smk"
include: "workflow/rules/mask.smk"
include: "workflow/rules/prune.smk"
include: "workflow/rules/retrain.smk"
include: "workflow/rules/generate.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/toys.smk"


if plan.config.ablations:

    include: "workflow/rules/ablations.smk"


localrules:
    all,
    figures,
    gallery,
    masks,
    pruned,
    tables,
    toys,


rule all:
    default_target: True
    input:
        rules.tables.output,
        rules.figures.output,
        rules.gallery.output,
        plan.all_shards(),


onstart:
    begin()


onsuccess:
    summarise()
