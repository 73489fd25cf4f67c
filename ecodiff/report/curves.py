"""Figures of curves: quality against sparsity, and how masks and pruned models learned."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ecodiff.config.variants import Variant
from ecodiff.report.drawing import decades, legend_below, panels
from ecodiff.report.results import Results
from ecodiff.report.style import (
    COMPARED_TO_DENSE,
    QUALITY,
    Quantity,
    colour,
    label,
    look,
    method,
)
from ecodiff.runtime.errors import UserError

ACROSS = 3  # panels beside each other
FEW = 6  # lines that can be told apart in a panel
WIDE = 50  # ratio of the largest to the smallest value above which an axis is logarithmic
GREY = {"color": "#bbbbbb", "linewidth": 0.5, "zorder": 1}


def quality(results: Results, model: str) -> Figure:
    """Each quality metric against the share of parameters removed, one line per method.

    With several seeds, points are means and bars standard deviations. More methods than `FEW` are
    shown some at a time: a row a metric, a column some methods, with all others in grey.
    """
    variants = results.of(model)
    dense, pruned = variants[0], variants[1:]
    table = pd.DataFrame([_row(results, model, variant) for variant in variants])
    shown = [one for one in QUALITY if table[one.key].notna().any()]
    lines: dict[str, Variant] = {}
    for variant in pruned:
        lines.setdefault(method(variant), variant)
    groups = _groups([*lines.values()])
    figure, axes = _grid(len(shown), len(groups))
    for axis, (metric, group) in zip(axes.flat, product(shown, groups), strict=False):
        for name, line in lines.items():
            seeds = table[table["line"] == name].dropna(subset=metric.key).groupby("percent")
            x, y = 100 * seeds["share"].mean(), metric.scale * seeds[metric.key].mean()
            spread = metric.scale * seeds[metric.key].std(ddof=0)
            axis.plot(x, y, **({"label": name, **look(line)} if line in group else GREY))
            if line in group and spread.any():
                bars = {"fmt": "none", "ecolor": colour(line), "capsize": 1.5}
                axis.errorbar(x, y, spread, **bars)
        if metric.key not in COMPARED_TO_DENSE and dense.is_dense:
            value = metric.scale * table[metric.key].iloc[0]
            axis.axhline(value, color=colour(dense), linestyle=":", label="Dense")
        if len(groups) == 1 or axis in axes[:, 0]:
            title = metric.title.replace(" ↓", "\u00a0↓").replace(" ↑", "\u00a0↑")  # on one line
            axis.set_ylabel("\n".join(textwrap.wrap(title, 20 if len(groups) == 1 else 13)))
        axis.set_xticks(_at_most(5, sorted({variant.percent for variant in pruned})))
        _scale(axis, metric)
    _name_lines(figure, axes, len(groups))
    figure.suptitle(f"{model}: quality against the share of the denoiser's parameters removed")
    return figure


def _row(results: Results, model: str, variant: Variant) -> dict[str, Any]:
    """What is drawn of a variant. Images equal to the dense model's have infinite PSNR, which is
    None in files: no point."""
    found = results.quality(model, variant)
    values = {one.key: np.nan if found[one.key] is None else found[one.key] for one in QUALITY}
    share = results.sparsity(model, variant)
    return {"line": method(variant), "percent": variant.percent, "share": share, **values}


def _groups(lines: Sequence[Variant]) -> list[list[Variant]]:
    """Lines in groups of `FEW` that are shown together; those of one score stay together."""
    by_score: dict[str, list[Variant]] = {}
    for line in lines:
        by_score.setdefault(line.method, []).append(line)
    groups: list[list[Variant]] = [[]]
    for same in by_score.values():
        if groups[-1] and len(groups[-1]) + len(same) > FEW:
            groups.append([])
        groups[-1] += same
    return groups


def _grid(metrics: int, groups: int) -> tuple[Figure, Any]:
    """A panel a metric, or a row a metric with a panel a group."""
    if groups > 1:
        return panels(metrics, groups, 2.4 + 0.8 * metrics, sharex=True, sharey="row")
    rows = -(-metrics // ACROSS)
    figure, axes = panels(rows, ACROSS, 0.9 + 1.35 * rows)
    for axis in axes.flat[metrics:]:
        axis.set_axis_off()
    return figure, axes


def _name_lines(figure: Figure, axes: Any, groups: int) -> None:
    """What is along x, and a legend: of one group below the figure, of several above each."""
    for column in axes.T:
        [*_, lowest] = [axis for axis in column if axis.axison]
        lowest.set_xlabel("Removed (%)")
    if groups == 1:
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=ACROSS)
        return
    for axis in axes[0]:
        handles, names = axis.get_legend_handles_labels()
        names = [name.replace(" + ", "\n+ ") for name in names]
        place = {"loc": "lower left", "bbox_to_anchor": (-0.1, 1.05), "borderaxespad": 0}
        axis.legend(handles, names, fontsize=6, handlelength=1.6, handletextpad=0.4, **place)


def _scale(axis: Axes, metric: Quantity) -> None:
    """Logarithmic where values are far apart."""
    drawn = [y for line in axis.get_lines() for y in line.get_ydata() if y > 0]
    wide = metric.better == "lower" and max(drawn, default=1) > WIDE * min(drawn, default=1)
    if metric.key.startswith("latent_error") or (wide and metric.key != "kid"):
        decades(axis, "y")
    elif wide:  # KID is an unbiased estimate and may be negative
        axis.set_yscale("symlog", linthresh=10)
        axis.set_yticks([one for one in (0, 10, 30, 100, 300, 1000) if one <= max(drawn)])
        axis.set_yticks([], minor=True)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _at_most(count: int, values: list[int]) -> list[int]:
    """At most `count` of the values, evenly chosen, so that tick labels do not overlap."""
    return values[:: -(-len(values) // count)] if values else []


def learning(results: Results, model: str) -> Figure:
    """Curves of mask learning (distortion, expected sparsity) and of retraining; `UserError` where
    there are neither."""
    scored = dict.fromkeys(v.scores for v in results.of(model) if not v.is_dense)
    curves = {v: results.learning(model, v) for v in scored}
    curves = {v: curve for v, curve in curves.items() if len(curve)}
    retrained = [v for v in results.shown(model) if v.retrain]
    if not curves and not retrained:
        raise UserError(f"report: of {model}, no mask was learned and no model retrained")
    figure, axes = panels(1, 2 * bool(curves) + bool(retrained), 2.8)
    if curves:
        _masks(axes[0, 0], axes[0, 1], curves)
    for variant in retrained:
        axis, curve = axes[0, -1], results.retraining(model, variant)
        smooth = curve["loss"].rolling(20, min_periods=1).mean()
        axis.plot(curve["step"], curve["loss"], color=colour(variant), alpha=0.25)
        axis.plot(curve["step"], smooth, color=colour(variant), label=label(variant))
        axis.set(
            title="Retraining\n(line: mean of 20)",
            ylabel="Training loss\n(mean squared error)",
            xlabel="Step of retraining",
        )
    for axis in axes.flat:
        legend_below(axis)
    figure.suptitle(f"{model}: learning curves")
    return figure


def _masks(distortion: Axes, sparsity: Axes, curves: dict[Variant, pd.DataFrame]) -> None:
    shades = plt.get_cmap("viridis")
    for number, (variant, curve) in enumerate(curves.items()):
        shade = {"color": shades(0.85 * number / max(len(curves) - 1, 1))}
        smooth = curve["distortion"].rolling(10, min_periods=1).mean()
        distortion.plot(curve["iteration"], curve["distortion"], alpha=0.25, **shade)
        distortion.plot(curve["iteration"], smooth, label=label(variant), **shade)
        expected = 100 * curve["expected_sparsity"]
        sparsity.plot(curve["iteration"], expected, label=label(variant), **shade)
        if "target_sparsity" in curve:
            sparsity.plot(curve["iteration"], 100 * curve["target_sparsity"], ":", **shade)
    decades(distortion, "y")
    distortion.set(
        title="Distortion\n(line: mean of 10)",
        ylabel="Relative squared error of z0",
        xlabel="Iteration of mask learning",
    )
    sparsity.set(
        title="Sparsity\n(dotted: target)",
        ylabel="Expected share removed\n(% of parameters)",
        xlabel="Iteration of mask learning",
    )
