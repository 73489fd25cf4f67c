"""A figure on masks: which parts lose units first, how captions of one and two objects fare, and
how far masks of different seeds agree."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import combinations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ecodiff.config.variants import Variant
from ecodiff.report.drawing import legend_below, panels
from ecodiff.report.results import Results
from ecodiff.report.style import OBJECTS, REMOVED, look, method

SHOWN = "ecodiff"  # the method whose masks are shown by part
# Pattern for the end of a structure's name -> the part of the model; the first match counts.
PARTS = {
    r"single.*heads": "attention, single stream",
    r"attn1\.heads": "self-attention",
    r"attn2\.heads": "cross-attention",
    r"heads": "joint attention",
    r"single.*neurons": "feed-forward, single stream",
    r"context\.neurons": "feed-forward of the text",
    r"neurons": "feed-forward",
    r"modulation": "modulation",
    r"directions": "directions of modulation",
}


def analysis(results: Results, model: str) -> Figure:
    """The figure, with up to three panels against sparsity.

    Removed units by part of the model; scene accuracy of captions with one and two objects, where
    captions are ShapeWorld's; agreement of masks of different seeds, where there are several.
    """
    masks = dict.fromkeys(v.scores for v in results.of(model) if not v.is_dense)
    kept = {mask: results.kept(model, mask) for mask in masks}
    shared = overlaps(kept)
    drawn = [lambda axis: _parts(axis, kept)]
    judged = [v for v in results.of(model) if v.method == SHOWN and not v.retrain]
    if judged and results.quality(model, judged[0]).get("scene_accuracy_one") is not None:
        drawn.append(lambda axis: _objects(axis, results, model))
    if len(shared):
        drawn.append(lambda axis: _overlaps(axis, shared))
    figure, axes = panels(1, len(drawn), 3.6)
    for axis, draw in zip(axes[0], drawn, strict=True):
        draw(axis)
        axis.set(xlabel=REMOVED, xticks=sorted({variant.percent for variant in masks}))
        legend_below(axis)
    figure.suptitle(f"{model}: what masks take")
    return figure


def part_of(name: str) -> str:
    """The part of the model that a structure belongs to, such as `cross-attention`."""
    return next(part for pattern, part in PARTS.items() if re.search(pattern + "$", name))


def removed_of_parts(kept: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Share of the units that a mask removes, by part of the model.

    Args:
        kept: structure name -> bool (units,), true for units that stay.
    """
    units: dict[str, list[np.ndarray]] = {}
    for name, stays in kept.items():
        units.setdefault(part_of(name), []).append(stays)
    return {part: 1 - float(np.concatenate(stays).mean()) for part, stays in units.items()}


def overlaps(kept: Mapping[Variant, Mapping[str, np.ndarray]]) -> pd.DataFrame:
    """Agreement of the masks of one method and sparsity that differ only in their seed.

    Args:
        kept: variant -> structure name -> bool (units,), true for units that stay.

    Returns:
        One row per method and sparsity with several seeds: variant (of the first seed), percent,
        overlap (mean of `common` over pairs of seeds) and chance (the expected overlap of random
        masks of the same size).
    """
    groups: dict[tuple[str, int], list[Variant]] = {}
    for variant in kept:
        groups.setdefault((variant.method, variant.percent), []).append(variant)
    rows = []
    for (_, percent), seeds in groups.items():
        gone = [~np.concatenate([*kept[v].values()]) for v in seeds]
        pairs = [common(a, b) for a, b in combinations(gone, 2)]
        if pairs:
            chance = float(np.mean([one.mean() for one in gone]))
            rows.append((seeds[0], percent, float(np.mean(pairs)), chance))
    return pd.DataFrame(rows, columns=["variant", "percent", "overlap", "chance"])


def common(a: np.ndarray, b: np.ndarray) -> float:
    """|a and b| / min(|a|, |b|) of two sets of units, bool (units,); 0 if one is empty."""
    return float((a & b).sum() / max(1, min(a.sum(), b.sum())))


def _parts(axis: Axes, kept: Mapping[Variant, Mapping[str, np.ndarray]]) -> None:
    own = [v for v in kept if v.method == SHOWN] or [*kept]
    shares = pd.DataFrame([{"percent": v.percent, **removed_of_parts(kept[v])} for v in own])
    means = 100 * shares.groupby("percent").mean()
    for part in means:
        axis.plot(means.index, means[part], marker="o", label=part)
    axis.set(title=f"Which parts go first\n({method(own[0])})", ylabel="Units removed (%)")


def _objects(axis: Axes, results: Results, model: str) -> None:
    variants = [v for v in results.of(model) if v.method in (SHOWN, "dense") and not v.retrain]
    for compensated in (False, True):
        line = [v for v in variants if v.is_dense or v.compensation == compensated]
        if not any(v.compensation == compensated for v in line if not v.is_dense):
            continue
        found = pd.DataFrame(
            [{"percent": v.percent, **_chosen(results.quality(model, v), OBJECTS)} for v in line]
        )
        means = 100 * found.groupby("percent").mean()
        for (key, name), shape in zip(OBJECTS.items(), ("o", "s"), strict=True):
            drawn = {**look(line[-1]), "marker": shape}
            axis.plot(means.index, means[key], label=f"{method(line[-1])}, {name}", **drawn)
    axis.set(title="Captions of one and of two objects", ylabel="Scene accuracy (%)")


def _overlaps(axis: Axes, shared: pd.DataFrame) -> None:
    for _, rows in shared.groupby(shared["variant"].map(method), sort=False):
        first = rows["variant"].iloc[0]
        axis.plot(rows["percent"], 100 * rows["overlap"], label=method(first), **look(first))
    chance = shared.groupby("percent")["chance"].mean()
    axis.plot(chance.index, 100 * chance, color="grey", linestyle=":", label="by accident")
    axis.set(title="Masks of two seeds", ylabel="Removed units in common (%)")


def _chosen(found: Mapping[str, float], keys: Iterable[str]) -> dict[str, float]:
    return {key: found[key] for key in keys}
