"""Reads a run's folder: the only file of the report that knows where stages write what."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open

from ecodiff.config.variants import Variant
from ecodiff.prompts import read_prompts
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.pictures import read_picture
from ecodiff.runtime.reading import read_text

SIDE = 256  # pixels; images are made smaller than this, which is enough for the grid of images


@dataclass(frozen=True)
class Results:
    """The results of a run. Methods raise `UserError` when a file is missing or damaged.

    Attributes:
        folder: `results/<run>`.
        variants: model -> names of its variants, in the order in which they are shown.
        prompts: parquet file of the evaluation prompts.
        examples: number of prompts in the grid of images.
        percents: sparsities, in per cent, in figures with one row or column per variant; None: all.
    """

    folder: Path
    variants: Mapping[str, Sequence[str]]
    prompts: Path
    examples: int = 8
    percents: frozenset[int] | None = None

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

    def quality(self, model: str, variant: Variant) -> dict[str, Any]:
        """The quality metrics of a variant, from `quality.json`: metric -> value or None."""
        return self._found(model, "quality.json")[variant.name]

    def efficiency(self, model: str) -> dict[str, dict[str, Any]] | None:
        """Variant name -> quantity -> value, from `efficiency.json`; None if not measured."""
        if not (self.folder / model / "efficiency.json").exists():
            return None
        return self._found(model, "efficiency.json")

    def mask_cost(self, model: str) -> pd.DataFrame:
        """The cost of mask-learning iterations, from `mask_cost.csv`."""
        return read_csv(self.folder / model / "mask_cost.csv")

    def sparsity(self, model: str, variant: Variant) -> float:
        """The exact share of the denoiser's parameters that a variant's mask removes."""
        if variant.is_dense:
            return 0.0
        return json.loads(self._mask(model, variant)[1]["ecodiff"])["sparsity"]

    def removed(self, model: str, variant: Variant) -> dict[str, float]:
        """Structure name -> the share of its units that a variant's mask removes."""
        kept, _ = self._mask(model, variant)
        return {name: 1 - float(stays.mean()) for name, stays in kept.items()}

    def kept(self, model: str, variant: Variant) -> dict[str, np.ndarray]:
        """Structure name -> bool (units,), true for units that a variant's mask keeps."""
        return self._mask(model, variant)[0]

    def learning(self, model: str, variant: Variant) -> pd.DataFrame:
        """The history of learning a variant's mask; no rows if the method does not learn, or if the
        scores are those of another sparsity's mask."""
        path = self.folder / model / "masks" / variant.mask / "history.csv"
        return read_csv(path) if path.exists() else pd.DataFrame(columns=["iteration"])

    def retraining(self, model: str, variant: Variant) -> pd.DataFrame:
        """The history of a variant's retraining, one row per step."""
        return read_csv(self.folder / model / variant.name / "model" / "history.csv")

    def captions(self) -> pd.Series:
        """The evaluation prompts, indexed by their number in the prompt set."""
        return read_prompts(self.prompts).set_index("index")["prompt"]

    def picture(self, model: str, variant: Variant, index: int) -> np.ndarray:
        """A variant's image of a prompt, at most `SIDE` pixels a side: uint8 (height, width, 3)."""
        folder = self.folder / model / variant.name / "images"
        found = list(folder.glob(f"*/{index:05d}.png"))
        if not found:
            raise UserError(f"report: {folder} has no picture of prompt {index}")
        image = read_picture(found[0])
        image.thumbnail((SIDE, SIDE))
        return np.asarray(image)

    def _found(self, model: str, file: str) -> dict[str, dict[str, Any]]:
        """Variant name -> its entry in a json file of a model; `UserError` if one is missing."""
        path = self.folder / model / file
        found = _json(path)
        missing = [name for name in self.variants[model] if name not in found]
        if missing:
            raise UserError(f"{path}: has no variant {missing[0]}; evaluate again")
        return found

    def _mask(self, model: str, variant: Variant) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        cut = next(v.pruned for v in self.of(model) if v.mask == variant.mask)
        return read_mask(self.folder / model / cut.name / "model/mask.safetensors")


def read_mask(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a mask without torch: structure name -> bool (units,), true for units that stay, and the
    file's metadata. Raises `UserError` when the file is missing or damaged."""
    try:
        with safe_open(path, framework="np") as file:
            kept = [key for key in file.keys() if key.startswith("kept/")]  # noqa: SIM118
            found = {key.removeprefix("kept/"): file.get_tensor(key) for key in kept}
            return found, file.metadata()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def read_csv(path: Path) -> pd.DataFrame:
    """Read a csv file that a stage wrote. Raises `UserError` when it is missing or damaged."""
    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
