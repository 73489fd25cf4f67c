"""Variants: the versions of a model that a run compares. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from ecodiff.config.methods import METHODS
from ecodiff.config.sections import (
    MethodName,
    Name,
    NonEmpty,
    RetrainKind,
    Seed,
    Settings,
    Share,
)
from ecodiff.runtime.errors import UserError


def _listed(value: Any) -> Any:
    """A list of one, where only one is given."""
    return value if isinstance(value, list | tuple) else [value]


class VariantSettings(Settings):
    """A family of variants: one a method, sparsity, seed, and with compensation or without."""

    method: Annotated[
        NonEmpty[MethodName],
        BeforeValidator(_listed, json_schema_input_type=MethodName | list[MethodName]),
    ]
    """One, or a list of them."""
    sparsities: NonEmpty[Share]
    """Shares of the denoiser's parameters to remove, in whole per cent."""
    compensation: Annotated[
        NonEmpty[bool], BeforeValidator(_listed, json_schema_input_type=bool | list[bool])
    ] = (False,)
    """Re-solve the surviving weights by least squares; [false, true] for variants of both kinds."""
    seeds: NonEmpty[Seed] | None = None
    """A variant for each seed of the scores, instead of one with the seed of the section `mask`."""
    retrain: RetrainKind | None = None
    models: NonEmpty[Name] | None = None
    """The models it applies to; null: all."""

    @model_validator(mode="after")
    def _whole_percents(self) -> VariantSettings:
        for sparsity in self.sparsities:
            percent = 100 * sparsity
            if not 1 <= round(percent) <= 99 or abs(percent - round(percent)) > 1e-6:
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
    """One version of a model; its name is a folder and a table row.

    `dense` or `{method}-{percent}[-s{seed}][-comp][-lora|-full]`, such as `ecodiff-30-comp-lora`.
    """

    method: MethodName | Literal["dense"] = "dense"
    percent: int = 0
    compensation: bool = False
    retrain: RetrainKind | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        """The inverse of `parse`."""
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
        """The variant that is its mask and nothing else."""
        return replace(self, retrain=None, compensation=False)

    @classmethod
    def parse(cls, name: str) -> Variant:
        """The variant of a name; UserError when it is none."""
        match = VARIANT_NAME.fullmatch(name)
        if match is None:
            raise UserError(
                f"variant {name!r}: expected dense or "
                f"({'|'.join(METHODS)})-<percent>[-s<seed>][-comp][-lora|-full]"
            )
        if match["method"] is None:
            return cls()
        seed = None if match["seed"] is None else int(match["seed"])
        found = (match["method"], int(match["percent"]), bool(match["comp"]), match["retrain"])
        return cls(*found, seed)  # type: ignore[arg-type]


VARIANT_NAME = re.compile(
    rf"dense|(?P<method>{'|'.join(METHODS)})-(?P<percent>[1-9]\d?)"
    r"(?:-s(?P<seed>\d+))?(?P<comp>-comp)?(?:-(?P<retrain>lora|full))?"
)
