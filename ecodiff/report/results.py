"""A run's folder: the only file of the report that knows where stages write what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ecodiff.config.variants import Variant
from ecodiff.models.identity import read_origin
from ecodiff.prompts import read_prompts
from ecodiff.report.files import read_csv, read_json, read_mask, read_seen
from ecodiff.report.style import COST, OBJECTS, QUALITY
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.pictures import read_picture

QUARTILES = ("latency_ms_low", "latency_ms_high")
SIDE = 256  # pixels; images are made smaller than this, which is enough for the grid of images


@dataclass(frozen=True)
class Results:
    """The results of a run. Methods raise `UserError` when a file is missing or damaged.

    Attributes:
        folder: `results/<run>`.
        variants: model -> names of its variants, in the order in which they are shown.
        sets: names of the prompt sets that they were judged on; pictures are of the first.
        shard_size: how many of them a shard of pictures holds.
        examples: how many of them the picture grid shows.
        percents: of the variants in figures that have a row or column a variant; None: all.
    """

    folder: Path
    variants: Mapping[str, Sequence[str]]
    sets: Sequence[str]
    shard_size: int
    examples: int = 8
    percents: frozenset[int] | None = None
    _read: dict[tuple[str, str], dict[str, dict[str, Any]]] = field(
        default_factory=dict, repr=False
    )

    def of(self, model: str) -> list[Variant]:
        """All variants of a model. Raises `UserError` when there is no such model."""
        if model not in self.variants:
            raise UserError(f"report: no model {model!r}; there are {', '.join(self.variants)}")
        return [Variant.parse(name) for name in self.variants[model]]

    def shown(self, model: str) -> list[Variant]:
        """The variants in figures with one row or column per variant: the dense one, and those of
        the first seed and the sparsities `percents`."""
        found = self.of(model)
        first = min((v.seed for v in found if v.seed is not None), default=None)
        return [
            variant
            for variant in found
            if variant.is_dense
            or (
                variant.seed in (None, first)
                and (self.percents is None or variant.percent in self.percents)
            )
        ]

    def masks(self, model: str) -> list[Variant]:
        """The masks of the variants in `shown`, each once, as the variant without compensation and
        retraining."""
        pruned = [variant for variant in self.shown(model) if not variant.is_dense]
        return list(dict.fromkeys(variant.scores for variant in pruned))

    def quality(self, model: str, variant: Variant, prompts: str | None = None) -> dict[str, Any]:
        """What `evaluate quality` found on a prompt set; None: on the first."""
        keys, prompts = [*(one.key for one in QUALITY), *OBJECTS], prompts or self.sets[0]
        places = self._places(model, prompts)
        # What is no number is so for all: no real images, or captions that nothing checks. But
        # pictures that are identical have no finite PSNR.
        found = self._judged(model, prompts)
        for name, path in places.items():
            _check(path, name, found[name], keys)
        for key in (key for key in keys if key != "psnr"):
            lacking = [name for name in places if found[name][key] is None]
            if 0 < len(lacking) < len(places):
                path = places[lacking[0]]
                raise UserError(f"{path}: has no {key}, others have; evaluate again")
        return dict(found[variant.name])

    def _places(self, model: str, prompts: str) -> dict[str, Path]:
        folder, file = self.folder / model, f"{prompts}.json"
        return {name: folder / name / "quality" / file for name in self.variants[model]}

    def _judged(self, model: str, prompts: str) -> dict[str, dict[str, Any]]:
        """What `evaluate quality` wrote of each variant of a model, read once."""
        if (model, prompts) not in self._read:
            places = self._places(model, prompts)
            self._read[model, prompts] = {name: read_json(path) for name, path in places.items()}
        return self._read[model, prompts]

    def efficiency(self, model: str) -> dict[str, dict[str, Any]] | None:
        """Variant name -> quantity -> value, from `efficiency.json`; None if not measured."""
        if not (self.folder / model / "efficiency.json").exists():
            return None
        keys = [*(one.key for one in COST), *QUARTILES, "device"]
        return self._found(model, "efficiency.json", keys)

    def mask_cost(self, model: str) -> pd.DataFrame:
        """What `evaluate mask-cost` found."""
        columns = ["steps", "kept", "seconds", "floor_seconds", "peak_memory_mb"]
        return read_csv(self.folder / model / "mask_cost.csv", columns)

    def sparsity(self, model: str, variant: Variant) -> float:
        """The exact share of the denoiser's parameters that a variant's mask removes."""
        if variant.is_dense:
            return 0.0
        path = self._mask(model, variant)
        found = read_mask(path)[1].get("sparsity")
        if not _is_number(found):
            raise UserError(f"{path}: its sparsity is {found!r}, not a number")
        return found

    def removed(self, model: str, variant: Variant) -> dict[str, float]:
        """Structure name -> the share of its units that a variant's mask removes."""
        kept = self.kept(model, variant)
        return {name: 1 - float(stays.mean()) for name, stays in kept.items()}

    def kept(self, model: str, variant: Variant) -> dict[str, np.ndarray]:
        """Structure name -> bool (units,), what a variant's mask keeps."""
        return read_mask(self._mask(model, variant))[0]

    def learning(self, model: str, variant: Variant) -> pd.DataFrame:
        """The history of learning a variant's mask; no rows if the method does not learn, or if the
        scores are those of another sparsity's mask."""
        path = self.folder / model / "masks" / variant.mask / "history.csv"
        columns = ["iteration", "distortion", "expected_sparsity"]
        return read_csv(path, columns) if path.exists() else pd.DataFrame(columns=columns)

    def retraining(self, model: str, variant: Variant) -> pd.DataFrame:
        """How a variant was retrained."""
        path = self.folder / model / variant.name / "model" / "history.csv"
        return read_csv(path, ["step", "loss"])

    @property
    def prompts(self) -> Path:
        """The table of the evaluation prompts (parquet)."""
        return self.folder / f"prompts/{self.sets[0]}.parquet"

    @cached_property
    def table(self) -> pd.DataFrame:
        """The table of the evaluation prompts, in the order of their index."""
        return read_prompts(self.prompts)

    def seen(self, model: str, variant: Variant) -> pd.DataFrame:
        """What `evaluate see` found of each picture of a variant, a row a prompt of `table`.

        Returns:
            clip_score, ssim, latent_error (relative to the variance of the dense model's latents,
            as in `evaluate.quality`), and scene_accuracy (bool) where all captions are
            ShapeWorld's. Raises `UserError` also when the pictures are of other prompts.
        """
        folder = self.folder / model / variant.name / "seen" / self.sets[0]
        shards = range(-(-len(self.table) // self.shard_size))
        parts = [read_seen(folder / f"{shard}.safetensors") for shard in shards]
        found = pd.concat(parts, ignore_index=True)
        if found["index"].tolist() != self.table["index"].tolist():
            raise UserError(f"{folder}: is not of the prompts of {self.prompts}; evaluate again")
        variance = found["dense_square"].mean() - found["dense_mean"].mean() ** 2
        shown = found[["clip_score", "ssim"]].assign(latent_error=found["latent_error"] / variance)
        if found["objects"].all():
            shown["scene_accuracy"] = found["shown"].astype(bool)
        return shown

    def captions(self) -> pd.Series:
        """The evaluation prompts by their index."""
        return self.table.set_index("index")["prompt"]

    def picture(self, model: str, variant: Variant, index: int) -> np.ndarray:
        """The picture of a prompt, made smaller than `SIDE`: uint8 (height, width, 3).

        It lies in the shard where the run's shard size puts it. Raises `UserError` when it is
        missing or damaged, or was drawn of another prompt, call or dense model.
        """
        table = self.table
        row = table["index"].tolist().index(index)
        shard, dense = (
            self.folder / model / name / "images" / self.sets[0] / str(row // self.shard_size)
            for name in (variant.name, Variant().name)
        )
        (indices, origin), (_, of_dense) = read_origin(shard), read_origin(dense)
        odd = origin.odd_to(of_dense)
        if odd:
            raise UserError(f"{shard}: does not belong to {dense}: {odd}")
        wanted = (table["prompt"][row], int(table["seed"][row]))
        drawn = dict(zip(indices, zip(origin.prompts, origin.seeds, strict=True), strict=True))
        if drawn.get(index) != wanted:
            raise UserError(
                f"{shard}: prompt {index} is {drawn.get(index)}, but {wanted} in {self.prompts};"
                " generate again"
            )
        image = read_picture(shard / f"{index:05d}.png")
        image.thumbnail((SIDE, SIDE))
        return np.asarray(image)

    def _found(self, model: str, file: str, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What was found for each variant of a model: for each key a number, a text or None."""
        path = self.folder / model / file
        found = read_json(path)
        for name in self.variants[model]:
            one = found.get(name)
            if not isinstance(one, dict):
                raise UserError(f"{path}: has no variant {name}; evaluate again")
            _check(path, name, one, keys)
        return found

    def _mask(self, model: str, variant: Variant) -> Path:
        """The mask that was cut out of a variant's model."""
        cut = next(v.pruned for v in self.of(model) if v.mask == variant.mask)
        return self.folder / model / cut.name / "model/mask.safetensors"


def _check(path: Path, name: str, one: Mapping[str, Any], keys: Sequence[str]) -> None:
    """`UserError` unless each key of a variant is there and of its kind."""
    missing = [key for key in keys if key not in one]
    if missing:
        raise UserError(f"{path}: {name} has no {missing[0]}; evaluate again")
    odd = [key for key in keys if not _fits(key, one[key])]
    if odd:
        raise UserError(f"{path}: {odd[0]} of {name} is {one[odd[0]]!r}; evaluate again")


def _fits(key: str, value: Any) -> bool:
    """Whether a value is of the kind that a stage writes under a key."""
    if key == "device":
        return isinstance(value, str)
    may_lack = key in OBJECTS or key in {one.key for one in QUALITY}
    return (value is None and may_lack) or _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
