"""Reads a run's folder: the one place of the report that knows where stages leave what."""

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

SIDE = 256  # pixels; more than a cell of the picture grid shows


@dataclass(frozen=True)
class Results:
    """What a run found.

    Attributes:
        folder: `results/<run>`.
        variants: model -> names of its variants, in the order in which they are shown.
        prompts: table of the evaluation prompts (parquet).
        examples: how many of them the picture grid shows.
        percents: of the variants in figures that have a row or column a variant; None: all.
    """

    folder: Path
    variants: Mapping[str, Sequence[str]]
    prompts: Path
    examples: int = 8
    percents: frozenset[int] | None = None

    def of(self, model: str) -> list[Variant]:
        """The variants of a model."""
        if model not in self.variants:
            raise UserError(f"report: no model {model!r}; there are {', '.join(self.variants)}")
        return [Variant.parse(name) for name in self.variants[model]]

    def shown(self, model: str) -> list[Variant]:
        """The variants of a model that are shown one by one: the dense one, and those of the first
        seed and of the chosen sparsities."""
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
        """The masks among the variants that are shown, each as the variant that is no more."""
        pruned = [variant for variant in self.shown(model) if not variant.is_dense]
        return list(dict.fromkeys(variant.scores for variant in pruned))

    def quality(self, model: str, variant: Variant) -> dict[str, Any]:
        """What `evaluate quality` found."""
        return self._found(model, "quality.json")[variant.name]

    def efficiency(self, model: str) -> dict[str, dict[str, Any]] | None:
        """What `evaluate efficiency` found for each variant; None when it was not measured."""
        if not (self.folder / model / "efficiency.json").exists():
            return None
        return self._found(model, "efficiency.json")

    def mask_cost(self, model: str) -> pd.DataFrame:
        """What `evaluate mask-cost` found."""
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
        """Structure name -> bool (units,), what a variant's mask keeps."""
        return self._mask(model, variant)[0]

    def learning(self, model: str, variant: Variant) -> pd.DataFrame:
        """How the mask of a variant was learned; no rows when it wasn't, or with another one."""
        path = self.folder / model / "masks" / variant.mask / "history.csv"
        return read_csv(path) if path.exists() else pd.DataFrame(columns=["iteration"])

    def retraining(self, model: str, variant: Variant) -> pd.DataFrame:
        """How a variant was retrained."""
        return read_csv(self.folder / model / variant.name / "model" / "history.csv")

    def captions(self) -> pd.Series:
        """The evaluation prompts by their index."""
        return read_prompts(self.prompts).set_index("index")["prompt"]

    def picture(self, model: str, variant: Variant, index: int) -> np.ndarray:
        """The picture of a prompt, made smaller than `SIDE`: uint8 (height, width, 3)."""
        folder = self.folder / model / variant.name / "images"
        found = list(folder.glob(f"*/{index:05d}.png"))
        if not found:
            raise UserError(f"report: {folder} has no picture of prompt {index}")
        image = read_picture(found[0])
        image.thumbnail((SIDE, SIDE))
        return np.asarray(image)

    def _found(self, model: str, file: str) -> dict[str, dict[str, Any]]:
        """What was found for each variant of a model."""
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
    """What a mask keeps, structure name -> bool (units,), and its file's metadata; `UserError` when
    it is missing or damaged."""
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
    """A table that a stage left; `UserError` when it is missing or damaged."""
    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
