import json
import re
import sys
from pathlib import Path

import yaml

from ecodiff.runtime.artifacts import code_hash, write_text
from ecodiff.config.run import load_config
from ecodiff.config.variants import Variant
from ecodiff.runtime.errors import UserError
from ecodiff.config.sections import BLIND, LEARNED
from ecodiff.toys import TOYS

try:
    run = load_config(config)
except UserError as error:
    # A WorkflowError would print where it came from too; this line says all that a user needs.
    print(f"config: {error}", file=sys.stderr)
    sys.exit(1)

# From here on every key is there, so that `lookup` finds the defaults too.
config = run.model_dump(mode="json")

RESULTS = f"results/{run.run}"
VARIANTS = [(model, variant) for model in run.models for variant in run.variants_of(model)]
PRUNED = [(model, variant) for model, variant in VARIANTS if not variant.is_dense]
ABLATIONS = {model: {a.name: a for a in run.ablations_of(model)} for model in run.models}
FIGURES = [
    "quality",
    "pictures",
    "removed",
    "analysis",
    *(["learning"] if any(variant.method in LEARNED for _, variant in PRUNED) else []),
    *(["cost"] if run.evaluate.efficiency else []),
    *(["mask-cost"] if run.evaluate.mask_cost else []),
]


pathvars:
    results=RESULTS,
    logs=f"{RESULTS}/logs",
    benchmarks=f"{RESULTS}/benchmarks",


def one_of(names):
    """A wildcard's constraint to known values; to none when there are no values."""
    return "|".join(sorted({re.escape(str(name)) for name in names})) or r"\b\B"


wildcard_constraints:
    model=one_of(run.models),
    variant=one_of(variant.name for _, variant in VARIANTS),
    set=one_of(run.prompts),
    shard=r"\d+",


# The command comes from the active environment, or else from the one that Snakemake runs in.
# Python keeps what it compiles, even where containers forbid it: a job starts in half the time.
# Memory that a step gives back is kept for the next one: a fifth of the time on a CPU is fetching it.
shell.prefix(
    "set -euo pipefail; export PYTHONDONTWRITEBYTECODE="
    " MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=4294967296"
    f" PATH=$PATH:{Path(sys.executable).parent}; "
)


def settings(dpath):
    """A narrow part of the config as JSON, which the command line reads; nulls are left out."""
    part = lookup(dpath=dpath, within=config)

    def text(found):
        return json.dumps({key: value for key, value in (found or {}).items() if value is not None})

    return (lambda wildcards: text(part(wildcards))) if callable(part) else text(part)


def quality_settings():
    """What the judgement of pictures depends on, as JSON."""
    return run.evaluate.model_dump_json(exclude={"prompts", "efficiency", "mask_cost"})


def each(flag, name):
    """A flag before each file of a named input, which may be one file, several or none."""

    def flags(wildcards, input):
        found = input.get(name)
        return [f"{flag} {path}" for path in ([found] if isinstance(found, str) else found)]

    return flags


def resource(name):
    """What a job that holds a model asks for, from that model's section."""
    return lookup(dpath=f"models/{{model}}/resources/{name}", within=config)


def launch(wildcards):
    """What starts a job on several GPUs, a process on each; nothing for one."""
    gpus = run.models[wildcards.model].resources.gpu
    start = (
        "accelerate launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no"
    )
    return f"{start} --num_processes {gpus} --no_python " if gpus > 1 else ""


def all_cores():
    """A measurement takes the whole machine; on a cluster, the profile asks for a whole node."""
    return workflow.cores or 1


def source(model, variant):
    """The folder or hub id of a variant's model."""
    return run.models[model].source if variant == "dense" else f"{RESULTS}/{model}/{variant}/model"


def source_of(wildcards):
    """The folder or hub id of the model in the wildcards."""
    return source(wildcards.model, wildcards.variant)


def dense_files(wildcards):
    """The files of a dense model that lies in a folder; none for a model on the hub."""
    folder = Path(run.models[wildcards.model].source)
    if not folder.exists() and len(folder.parts) == 2:
        return []
    files = [*folder.rglob("*.json"), *folder.rglob("*.safetensors")]
    return sorted(map(str, files)) or [str(folder / "model_index.json")]


def model_files(wildcards):
    """What the model in the wildcards is read from."""
    return dense_files(wildcards) if wildcards.variant == "dense" else source_of(wildcards)


def clip_files():
    """The files of the CLIP model, when it lies in a folder."""
    _, local, folder = run.evaluate.clip_model.partition("local-dir:")
    return sorted(map(str, Path(folder).glob("*"))) or [folder] if local else []


def calibration(wildcards):
    """What masks are learned on."""
    return f"{RESULTS}/{wildcards.model}/{run.calibrate.prompts}.safetensors"


def scored(model, variant):
    """The variant whose mask holds a variant's scores: that of the middle sparsity of its method,
    or itself where each sparsity is learned for itself."""
    if variant.method in LEARNED and not run.models[model].mask.is_shared:
        return variant
    wanted = (variant.method, variant.seed)
    same = [v for v in run.variants_of(model) if (v.method, v.seed) == wanted]
    by_percent = sorted({v.percent: v for v in same}.items())
    return by_percent[len(by_percent) // 2][1]


def mask_of(wildcards):
    """The mask that holds a variant's scores."""
    mask = scored(wildcards.model, Variant.parse(wildcards.variant)).mask
    return f"{RESULTS}/{wildcards.model}/masks/{mask}/mask.safetensors"


def percent_of(wildcards):
    """The per cent of the parameters that a variant lacks."""
    return Variant.parse(wildcards.variant).percent


def mask_settings(wildcards):
    """How a mask is made: the model's settings with the mask's own seed, as JSON."""
    section, seed = run.models[wildcards.model].mask, Variant.parse(wildcards.mask).seed
    own = section if seed is None else section.model_copy(update={"seed": seed})
    return own.model_dump_json(exclude_none=True)


def method_of(wildcards):
    """The method of a mask."""
    return Variant.parse(wildcards.mask).method


def compensation_of(wildcards):
    """What a variant is compensated by: activations, all layers at once, or a calibration, in
    groups; nothing for others."""
    if not Variant.parse(wildcards.variant).compensation:
        return {}
    if run.prune.groups > 1:
        return {"calibration": calibration(wildcards)}
    return {"grams": f"{RESULTS}/{wildcards.model}/grams.safetensors"}


def pruned_of(wildcards):
    """The pruned model that a variant's retraining starts from."""
    return source(wildcards.model, Variant.parse(wildcards.variant).pruned.name)


def retraining_of(wildcards):
    """The settings that a variant is retrained by."""
    section = run.models[wildcards.model].retrain
    return getattr(section, Variant.parse(wildcards.variant).retrain)


def retraining_data(wildcards):
    """What the dense model made of the prompts that a variant is retrained on."""
    prompts = retraining_of(wildcards).prompts or run.calibrate.prompts
    return f"{RESULTS}/{wildcards.model}/{prompts}.safetensors"


def shards(model, variant):
    """The image shards of a variant."""
    count = -(-run.prompts[run.evaluate.prompts].count // run.generate.shard_size)
    return [f"{RESULTS}/{model}/{variant.name}/images/{shard}" for shard in range(count)]


def shards_of_variants(wildcards):
    """The image shards of all variants of a model."""
    return [s for v in run.variants_of(wildcards.model) for s in shards(wildcards.model, v)]


def ablation_of(wildcards):
    """The point of the sweep that the wildcards name."""
    return ABLATIONS[wildcards.model][wildcards.ablation]


def masks_of_ablations(wildcards):
    """The masks of a model's sweep."""
    folder = f"{RESULTS}/{wildcards.model}/ablations"
    return [f"{folder}/{name}/mask.safetensors" for name in ABLATIONS[wildcards.model]]


def of_models(file):
    """A file of each model."""
    return [f"<results>/{model}/{file}" for model in run.models]


def all_masks():
    """Each mask that is scored."""
    masks = {(model, scored(model, variant).mask) for model, variant in PRUNED}
    return sorted(f"<results>/{model}/masks/{mask}/mask.safetensors" for model, mask in masks)


def all_pruned():
    """The pruned models as they were before any retraining; each holds its mask."""
    return sorted({f"<results>/{model}/{v.pruned.name}/model" for model, v in PRUNED})


def folders_of(wildcards):
    """The folders of all pruned variants of a model."""
    return [source(model, v.name) for model, v in PRUNED if model == wildcards.model]


def names_and_sources(wildcards):
    """All variants of a model with where they lie, as flags."""
    variants = run.variants_of(wildcards.model)
    return [f"--variant {v.name}={source(wildcards.model, v.name)}" for v in variants]


def names_and_shards(wildcards):
    """All variants of a model with their image shards, as flags."""
    variants = run.variants_of(wildcards.model)
    return [f"--variant {v.name}={','.join(shards(wildcards.model, v))}" for v in variants]


def toy_vae(wildcards):
    """The autoencoder that both toy pipelines are trained on."""
    return "results/toys/toy-vae" if wildcards.toy in ("toy-sdxl", "toy-flux") else []


def summarise():
    """Prints the main table, if there is one, and where everything is."""
    table = Path(RESULTS, "tables/main.csv")
    if table.exists():
        import pandas

        from ecodiff.report.tables import print_table

        print_table(pandas.read_csv(table))
    places = {"tables": "tables", "figures": "figures", "settings": "config.yaml"}
    for name, place in places.items():
        if Path(RESULTS, place).exists():
            print(f"{name}: {RESULTS}/{place}")
