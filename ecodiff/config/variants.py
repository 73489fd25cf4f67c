"""Variants: the versions of a model that a run compares. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import BeforeValidator, model_validator

from ecodiff.config.methods import METHODS
from ecodiff.config.sections import (
    MethodName,
    Name,
    NonEmpty,
    RecipeName,
    Seed,
    Settings,
    Share,
    listed,
)
from ecodiff.runtime.errors import UserError


def is_whole_percent(share: float) -> bool:
    """Whether a share is a whole per cent from 0.01 to 0.99, as a variant's name can say it."""
    percent = 100 * share
    return 1 <= round(percent) <= 99 and abs(percent - round(percent)) < 1e-6


class VariantSettings(Settings):
    """A family of variants: all combinations of methods, sparsities, compensations and seeds."""

    method: Annotated[
        NonEmpty[MethodName],
        BeforeValidator(listed, json_schema_input_type=MethodName | list[MethodName]),
    ]
    """One method, or a list of them; docs/methods.md explains them."""
    sparsities: NonEmpty[Share]
    """Shares of the denoiser's parameters to remove, in steps of 0.01. Up to the maskable share of
    the model, see docs/families.md."""
    compensation: Annotated[
        NonEmpty[bool], BeforeValidator(listed, json_schema_input_type=bool | list[bool])
    ] = (False,)
    """Re-solve the surviving weights by least squares, without training; see the section `prune`.
    [false, true] gives variants of both kinds."""
    seeds: NonEmpty[Seed] | None = None
    """One variant for each of these seeds; null: one, with the seed of the section `mask`. Each
    seed scores all units again."""
    retrain: RecipeName | None = None
    """Retrain the pruned model by this recipe of the section `retrain`: lora, full, light, or one
    under a name of your own; null: not."""
    models: NonEmpty[Name] | None = None
    """The models it applies to; null: all."""

    @model_validator(mode="after")
    def _whole_percents(self) -> VariantSettings:
        for sparsity in self.sparsities:
            if not is_whole_percent(sparsity):
                raise ValueError(
                    f"sparsity {sparsity} is not a whole per cent from 0.01 to 0.99, such as 0.25"
                )
        return self

    def variants(self) -> list[Variant]:
        """The variants of the family."""
        return [
            Variant(method, round(100 * sparsity), compensation, self.retrain, seed)
            for method in self.method
            for compensation in self.compensation
            for sparsity in self.sparsities
            for seed in self.seeds or (None,)
        ]


@dataclass(frozen=True)
class Variant:
    """One version of a model. Its name is used for folders and table rows:

    `dense` or `{method}-{percent}[-s{seed}][-comp][-lora|-full|-light]`, such as
    `ecodiff-30-comp-lora`.

    Attributes:
        method: a key of `METHODS`, or `dense` for the untouched model.
        percent: target sparsity in whole per cent.
        compensation: whether surviving weights are re-solved by least squares.
        retrain: a recipe of the section `retrain`, or None.
        seed: seed of the scores; None: that of the section `mask`.
    """

    method: MethodName | Literal["dense"] = "dense"
    percent: int = 0
    compensation: bool = False
    retrain: RecipeName | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        """Its name, which `parse` reads."""
        if self.is_dense:
            return "dense"
        parts = [self.mask, "comp" if self.compensation else None, self.retrain]
        return "-".join(part for part in parts if part)

    @property
    def is_dense(self) -> bool:
        """Whether it is the untouched model."""
        return self.method == "dense"

    @property
    def mask(self) -> str:
        """The name of its mask, `{method}-{percent}[-s{seed}]`."""
        seed = "" if self.seed is None else f"-s{self.seed}"
        return f"{self.method}-{self.percent}{seed}"

    @property
    def sparsity(self) -> float:
        """The target share of the denoiser's parameters removed."""
        return self.percent / 100

    @property
    def pruned(self) -> Variant:
        """The variant that its retraining starts from; itself when not retrained."""
        return replace(self, retrain=None)

    @property
    def scores(self) -> Variant:
        """The variant with the same mask, without compensation and retraining."""
        return replace(self, retrain=None, compensation=False)

    @classmethod
    def parse(cls, name: str) -> Variant:
        """The variant that a name stands for. Raises `UserError` when the name has another form."""
        match = VARIANT_NAME.fullmatch(name)
        if match is None:
            raise UserError(
                f"variant {name!r}: expected dense or "
                f"({'|'.join(METHODS)})-<percent>[-s<seed>][-comp][-<recipe of retrain>]"
            )
        if match["method"] is None:
            return cls()
        seed = None if match["seed"] is None else int(match["seed"])
        found = (match["method"], int(match["percent"]), bool(match["comp"]), match["retrain"])
        return cls(*found, seed)  # type: ignore[arg-type]


VARIANT_NAME = re.compile(
    rf"dense|(?P<method>{'|'.join(METHODS)})-(?P<percent>[1-9]\d?)"
    r"(?:-s(?P<seed>\d+))?(?P<comp>-comp)?(?:-(?P<retrain>(?!comp$|s\d+$)[a-z][a-z0-9]*))?"
)
