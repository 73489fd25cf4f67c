"""What a config can be known to get wrong before the first job runs. Imports no torch.

`mistakes` looks at the config alone, `missing` at the files that it names.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from ecodiff.config.reading import Document, explain
from ecodiff.config.sections import MaskSettings, PromptSet
from ecodiff.config.variants import is_whole_percent

if TYPE_CHECKING:
    from ecodiff.config.run import Config

Mistake = tuple[tuple[str | int, ...], str]
"""The path of a key, and what is wrong with it."""

# Folders and files of a run that a model's or prompt set's name must not be.
OF_A_RUN = ("prompts", "real", "tables", "figures", "logs", "benchmarks", "config.yaml")
SHARDS = 500  # whose names fit into one command line of 128 kB
OF_A_MODEL = ("grams", "masks", "ablations")


def mistakes(config: Config) -> Iterator[Mistake]:
    """What contradicts itself within a config."""
    yield from _names(config)
    unknown = [*_unknown_prompts(config)]
    yield from unknown
    yield from _variants(config)
    ablations = [*_ablations(config)]
    yield from ablations
    if not unknown:
        yield from _overlaps(config)
        if not ablations:
            yield from _amounts(config)


def missing(config: Config) -> Iterator[Mistake]:
    """Files and folders that a config names and that are not there."""
    for name, model in config.models.items():
        if is_local(model.source) and not Path(model.source).exists():
            yield ("models", name, "source"), f"there is no file or folder {model.source}"
        elif Path(model.source).is_dir() and not Path(model.source, "model_index.json").is_file():
            yield ("models", name, "source"), f"{model.source} holds no model_index.json"
        elif quantised := quantiser_of(Path(model.source)):
            yield ("models", name, "source"), f"{model.source} is quantised ({quantised})"
    for name, prompts in config.prompts.items():
        folder = prompts.source in ("folder", "datasets")
        on_hub = prompts.source == "datasets" and not is_local(str(prompts.path))
        if prompts.path is not None and not on_hub:
            what, there = ("folder", Path.is_dir) if folder else ("file", Path.is_file)
            if not there(Path(prompts.path)):
                yield ("prompts", name, "path"), f"there is no {what} {prompts.path}"
        if prompts.images is not None and not Path(prompts.images).is_dir():
            yield ("prompts", name, "images"), f"there is no folder {prompts.images}"
    for key in ("clip_model", "cmmd_model"):
        _, local, folder = (getattr(config.evaluate, key) or "").partition("local-dir:")
        if local and not Path(folder).is_dir():
            yield ("evaluate", key), f"there is no folder {folder}"
    published = config.report.published
    if published is not None and not Path(published).is_file():
        yield ("report", "published"), f"there is no file {published}"


def to_fetch(config: Config) -> Iterator[Mistake]:
    """What a run will want from the network at its end, unless it lies here before."""
    place = inception_weights()
    if config.evaluate.features == "inception" and not place.is_file():
        yield ("evaluate", "features"), f"the weights of Inception are not at {place}"


def inception_weights() -> Path:
    """Where torchmetrics looks for the weights of its Inception network, and puts them."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))
    name = "weights-inception-2015-12-05-6726825d.pth"  # of torch-fidelity, v0.2.0
    return Path(home, "hub/checkpoints", name).expanduser()


def is_local(source: str) -> bool:
    """Whether a model's source is a path, there or not, and no id of the hub (`owner/name`).

    What looks like a path is one, even where a hub's name could look the same.
    """
    is_path = source.startswith((".", "/", "~")) or Path(source.split("/")[0]).is_dir()
    return is_path or not re.fullmatch(r"[\w.-]+/[\w.-]+", source)


def quantiser_of(folder: Path) -> str | None:
    """The method that a pipeline folder's denoiser was quantised by; None: it wasn't, by what its
    config says."""
    for part in ("unet", "transformer"):
        try:
            config = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
            return str(config["quantization_config"].get("quant_method"))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # whoever loads it says what is wrong
    return None


def _names(config: Config) -> Iterator[Mistake]:
    if config.run == "toys":
        yield ("run",), "results/toys holds the toys that are trained; choose another name"
    for model in config.models:
        if model in OF_A_RUN:
            yield ("models", model), f"results/{config.run}/{model} is taken; choose another name"
    for name in config.prompts:
        if name in OF_A_MODEL or name.endswith(".parquet"):
            yield ("prompts", name), "a file of the run has this name; choose another"


def _unknown_prompts(config: Config) -> Iterator[Mistake]:
    for path, name in _roles(config).items():
        if name not in config.prompts:
            yield path, f"no prompt set {name!r}; there are {', '.join(config.prompts)}"
    for name, times in Counter(config.evaluate.prompts).items():
        if times > 1:
            yield ("evaluate", "prompts"), f"{name} is named twice"


def _roles(config: Config) -> dict[tuple[str | int, ...], str]:
    """The key that names each prompt set that a run uses -> the set."""
    roles: dict[tuple[str | int, ...], str] = {
        ("calibrate", "prompts"): config.calibrate.prompts,
        ("evaluate", "prompts"): config.evaluate.prompts[0],
    }
    others = enumerate(config.evaluate.prompts[1:], start=1)
    roles |= {("evaluate", "prompts", place): name for place, name in others}
    for kind, section in config.retrain.items():
        if section.prompts is not None:
            roles["retrain", kind, "prompts"] = section.prompts
    for model, own in config.models.items():
        for kind, section in own.retrain.items():
            if section.prompts not in (None, roles.get(("retrain", kind, "prompts"))):
                roles["models", model, "retrain", kind, "prompts"] = str(section.prompts)
    if config.ablations:
        roles["ablations", "prompts"] = config.ablations.prompts
    return roles


def _variants(config: Config) -> Iterator[Mistake]:
    for index, family in enumerate(config.variants):
        for model in family.models or ():
            if model not in config.models:
                known = ", ".join(config.models)
                yield ("variants", index, "models"), f"no model {model!r}; there are {known}"
        for model in family.models or config.models:
            own = config.models.get(model)
            if own and family.retrain and family.retrain not in own.retrain:
                known = ", ".join(own.retrain)
                yield ("variants", index, "retrain"), f"no {family.retrain!r}; there are {known}"
    for model in config.models:
        counts = Counter(variant.name for variant in config.variants_of(model))
        for name, times in counts.items():
            if times > 1:
                yield ("variants",), f"{name} is named twice for {model}"


def _ablations(config: Config) -> Iterator[Mistake]:
    for sparsity in config.ablations.vary.get("sparsity", ()) if config.ablations else ():
        if not isinstance(sparsity, int | float) or not is_whole_percent(sparsity):
            path = ("ablations", "vary", "sparsity")
            yield path, f"{sparsity!r} is not a whole per cent from 0.01 to 0.99"
    for model in config.models:
        try:
            points = config.ablations_of(model)
        except ValidationError as error:
            for line in explain(error, MaskSettings, Document({})):
                yield ("ablations", "vary"), line
            continue
        for name, times in Counter(point.name for point in points).items():
            if times > 1:
                yield ("ablations", "vary"), f"{name} is named twice"


def _overlaps(config: Config) -> Iterator[Mistake]:
    """Prompts or noise that a model both learns from and is judged on."""
    if config.allow_overlap:
        return
    roles = _roles(config)
    for (one, first), (other, second) in combinations(roles.items(), 2):
        learns = {path[0] for path in (one, other)} <= {"calibrate", "retrain", "models"}
        judges = {path[0] for path in (one, other)} == {"evaluate"}
        if learns or judges:  # learned from twice, or judged on twice
            continue
        what = _shared(config.prompts[first], config.prompts[second], first == second)
        if what:
            key = ".".join(map(str, one))
            yield other, f"{what} {key}; set allow_overlap: true if that is meant"


def _shared(one: PromptSet, other: PromptSet, same: bool) -> str | None:
    if same:
        return "is the prompt set of"
    if one.path is not None and (one.path, one.split) == (other.path, other.split):
        return "takes its captions from the file of"
    if max(one.seed, other.seed) < min(one.seed + one.count, other.seed + other.count):
        return "starts from noise (its seeds) of"
    return None


def _amounts(config: Config) -> Iterator[Mistake]:
    """Batches larger than the data, steps beyond those there are."""
    calibration = config.prompts[config.calibrate.prompts].count
    chosen = config.evaluate
    evaluation = config.prompts[chosen.prompts[0]].count
    for name in chosen.prompts:
        if config.prompts[name].count < 2:
            yield ("prompts", name, "count"), "two pictures at least are judged"
    size = config.generate.shard_size
    largest = max(config.prompts[name].count for name in chosen.prompts)
    least = -(-largest // SHARDS)
    if size < least:
        message = f"{size} a shard of {largest} prompts; {least} at least: a job reads all shards"
        yield ("generate", "shard_size"), message
    if chosen.efficiency and chosen.efficiency.batch_size > evaluation:
        path = ("evaluate", "efficiency", "batch_size")
        yield path, f"{chosen.efficiency.batch_size} of {evaluation} prompts"
    if chosen.mask_cost and chosen.mask_cost.batch > calibration:
        path = ("evaluate", "mask_cost", "batch")
        yield path, f"{chosen.mask_cost.batch} of {calibration} prompts"
    for model, own in config.models.items():
        for key, message in _mask_amounts(own.mask, calibration, own.call.num_inference_steps):
            yield _own_or_shared(config, model, key), message
        for point in config.ablations_of(model):
            for key, message in _mask_amounts(
                point.settings, calibration, own.call.num_inference_steps
            ):
                if key in point.changes:
                    yield ("ablations", "vary", key), message
        for recipe in {v.retrain for v in config.variants_of(model)} & own.retrain.keys():
            section = own.retrain[str(recipe)]
            prompts = section.prompts or config.calibrate.prompts
            count = config.prompts[prompts].count
            if section.states == "pictures" and not config.prompts[prompts].has_pictures:
                path = ("retrain", str(recipe), "states")
                yield path, f"the prompt set {prompts} has no pictures"
            if 2 * section.batch > count:
                message = f"{section.batch} of {count} prompts; two batches at least are needed"
                yield ("retrain", str(recipe), "batch"), message


def _mask_amounts(mask: MaskSettings, prompts: int, steps: int) -> Iterator[tuple[str, str]]:
    used = prompts if mask.prompts is None else min(mask.prompts, prompts)
    if mask.batch > used:
        yield "batch", f"{mask.batch} of {used} prompts"
    if isinstance(mask.keep_steps, int) and mask.keep_steps > steps:
        yield "keep_steps", f"{mask.keep_steps} of {steps} steps"


def _own_or_shared(config: Config, model: str, key: str) -> tuple[str | int, ...]:
    """Where a model's mask setting comes from: its own section, or the shared one."""
    own = config.models[model].mask
    shared = getattr(own, key) == getattr(config.mask, key)
    return ("mask", key) if shared else ("models", model, "mask", key)
