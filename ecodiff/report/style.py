"""Names, units and looks of methods and quantities, the same in all tables and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ecodiff.config.methods import METHODS
from ecodiff.config.variants import Variant

BLACK = "#000000"
MARKERS = {"lora": "^", "full": "s", "light": "v"}
REMOVED = "Parameters removed (%)"  # of the denoiser's
RETRAINED = {"lora": "LoRA", "full": "retraining", "light": "biases and norms"}


def colour(variant: Variant) -> str:
    """The colour of a variant's method."""
    return BLACK if variant.is_dense else METHODS[variant.method].colours[variant.compensation]


def look(variant: Variant) -> dict[str, Any]:
    """The style of a method's line: keyword arguments for matplotlib's `plot`."""
    found = {"color": colour(variant), "marker": "o"}
    if variant.retrain:
        marker = {"marker": MARKERS.get(variant.retrain, "P"), "markersize": 5}
        edge = {"markeredgecolor": "black", "markeredgewidth": 0.6}
        return found | marker | edge | {"linestyle": ":"}
    return found | {"linestyle": "--", "marker": "D"} if variant.compensation else found


def method(variant: Variant) -> str:
    """The name of a variant's method, such as "EcoDiff + least squares"."""
    compensated = " + least squares" if variant.compensation else ""
    title = "Dense" if variant.is_dense else METHODS[variant.method].title
    recipe = variant.retrain
    return title + compensated + (f" + {RETRAINED.get(recipe, recipe)}" if recipe else "")


def label(variant: Variant) -> str:
    """The name of a variant, such as "EcoDiff + least squares, 20 %"."""
    seed = "" if variant.seed is None else f", seed {variant.seed}"
    return method(variant) if variant.is_dense else f"{method(variant)}, {variant.percent} %{seed}"


@dataclass(frozen=True)
class Quantity:
    """A measured quantity: its column in files, and how tables and figures show it.

    Attributes:
        key: its column in main.csv.
        name: its name with the unit that is shown.
        scale: factor from the value in files to that unit.
        digits: format specification, such as `.2f`.
        better: "higher", "lower" or None.
        short: a short name with unit, for the terminal.
    """

    key: str
    name: str
    scale: float = 1.0
    digits: str = ".2f"
    better: str | None = None
    short: str = ""

    @property
    def title(self) -> str:
        """The name with an arrow, ↑ if higher is better, ↓ if lower is."""
        return self.name + {"higher": " ↑", "lower": " ↓", None: ""}[self.better]

    def show(self, value: float | None) -> str:
        """A value from files as text in the shown unit; missing is "-", infinite "∞"."""
        if value is None or math.isnan(value):
            return "-"
        return "∞" if math.isinf(value) else format(value * self.scale, self.digits)


QUALITY = (
    Quantity("fid", "FID", better="lower", short="FID"),
    Quantity("kid", "KID (10⁻³)", 1e3, better="lower", short="KID 10⁻³"),
    Quantity("cmmd", "CMMD", digits=".3f", better="lower", short="CMMD"),
    Quantity("clip_score", "CLIP score (cosine)", digits=".3f", better="higher", short="CLIP"),
    Quantity("scene_accuracy", "Scene accuracy (%)", 100, ".1f", "higher", short="scenes %"),
    Quantity("ssim", "SSIM to dense", digits=".3f", better="higher", short="SSIM"),
    Quantity("psnr", "PSNR to dense (dB)", better="higher", digits=".1f", short="PSNR dB"),
    Quantity(
        "latent_error", "Relative latent error", digits=".4f", better="lower", short="z0 error"
    ),
    Quantity(
        "latent_error_median",
        "Relative latent error, median (10⁻³)",
        1e3,
        better="lower",
        short="median 10⁻³",
    ),
)
# Metrics that compare with the dense model, whose own value is trivial and not shown.
COMPARED_TO_DENSE = {"ssim", "psnr", "latent_error", "latent_error_median"}


def quality_of(sets: Sequence[str]) -> dict[str, tuple[Quantity, ...]]:
    """The columns of each prompt set in tables: of the first one plain, of others with its name;
    where there are several, each says which set it is of."""
    if len(sets) < 2:
        return dict.fromkeys(sets, QUALITY)
    return {
        name: tuple(
            replace(
                one,
                key=one.key if name == sets[0] else f"{one.key}_{name}",
                name=f"{name}: {one.name}",
            )
            for one in QUALITY
        )
        for name in sets
    }


# The checker's verdict on captions of each kind, beside that on all.
OBJECTS = {"scene_accuracy_one": "one object", "scene_accuracy_two": "two objects"}
COST = (
    Quantity("parameters", "Parameters (M)", 1e-6),
    Quantity("denoiser_parameters", "Denoiser parameters (M)", 1e-6, short="params M"),
    Quantity("gmacs", "GMACs an image"),
    Quantity("latency_ms_per_image", "Time an image (ms)", digits=".1f", short="ms"),
    Quantity("peak_memory_mb", "Peak memory (MB)", digits=".1f"),
    Quantity("disk_mb", "Weights on disk (MB)", digits=".1f"),
    Quantity("denoiser_disk_mb", "Denoiser on disk (MB)", digits=".1f"),
)
TARGET = Quantity("target_sparsity", "Target sparsity (%)", 100, ".0f", short="aim %")
EXACT = Quantity("sparsity", "Exact sparsity (%)", 100, short="cut %")
