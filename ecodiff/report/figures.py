"""The figures of a run: each is a function of its results and a model name. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path
from typing import Literal

import matplotlib
import pandas as pd

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from ecodiff.config.variants import Variant
from ecodiff.report import analysis, pictures
from ecodiff.report.results import QUARTILES, Results
from ecodiff.report.style import COST, QUALITY, REMOVED, colour, label, look, method
from ecodiff.runtime.artifacts import atomic
from ecodiff.runtime.errors import UserError

plt.rcParams.update(
    {
        "figure.constrained_layout.use": True,
        "savefig.dpi": 150,
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "pdf.fonttype": 42,  # TrueType: text can be selected and edited
    }
)
WIDE = 50  # ratio of the largest to the smallest value above which an axis is logarithmic
FITTING = 12  # number of legend entries that fit into the place of a panel
# Metrics that compare with the dense model, whose own value is trivial: no line is drawn for it.
COMPARED_TO_DENSE = {"ssim", "psnr", "latent_error", "latent_error_median"}


def quality(results: Results, model: str) -> Figure:
    """Each quality metric against the share of parameters removed, one line per method.

    With several seeds, points are means and bars standard deviations.
    """
    variants = results.of(model)
    found = {variant: results.quality(model, variant) for variant in variants}
    shares = {variant: 100 * results.sparsity(model, variant) for variant in variants}
    shown = [one for one in QUALITY if any(f[one.key] is not None for f in found.values())]
    figure, axes = plt.subplots(2, 5, figsize=(18, 7))
    for axis, metric in zip(axes.flat, shown, strict=False):
        for line in _lines(variants):
            # Images equal to the dense model's have infinite PSNR, None here: no point is drawn.
            points = [(v.percent, shares[v], found[v][metric.key]) for v in line]
            points = [(p, x, metric.scale * y) for p, x, y in points if y is not None]
            seeds = pd.DataFrame(points, columns=["percent", "x", "y"]).groupby("percent")
            mean, spread = seeds.mean(), seeds["y"].std(ddof=0)
            axis.plot(mean["x"], mean["y"], label=method(line[0]), **look(line[0]))
            if spread.any():
                bars = {"fmt": "none", "ecolor": colour(line[0]), "capsize": 2}
                axis.errorbar(mean["x"], mean["y"], spread, **bars)
        if metric.key not in COMPARED_TO_DENSE and variants[0].is_dense:
            dense = metric.scale * found[variants[0]][metric.key]
            axis.axhline(dense, color=colour(variants[0]), linestyle=":", label="Dense")
        axis.set(title=metric.title, ylabel=metric.name, xlabel=REMOVED)
        axis.set_xticks(_at_most(10, sorted({variant.percent for variant in variants[1:]})))
        drawn = [y for line in axis.get_lines() for y in line.get_ydata() if y > 0]
        wide = metric.better == "lower" and max(drawn, default=1) > WIDE * min(drawn, default=1)
        if metric.key.startswith("latent_error") or (wide and metric.key != "kid"):
            decades(axis, "y")
        elif wide:  # KID is an unbiased estimate and may be negative
            axis.set_yscale("symlog", linthresh=100)
    _legend(axes.flat[0], list(axes.flat[len(shown) :]), figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.12)
    figure.suptitle(f"{model}: quality against sparsity", fontsize=13)
    return figure


def cost(results: Results, model: str) -> Figure:
    """Size, operations, time and memory of each variant, and their change from the dense model.

    Raises `UserError` when efficiency was not measured.
    """
    measured = results.efficiency(model)
    if measured is None:
        raise UserError(f"report: {model} has no efficiency.json; evaluate.efficiency is null")
    variants = results.shown(model)
    dense = measured[variants[0].name]
    columns = [one for one in COST if not one.key.startswith("denoiser")]
    figure, axes = plt.subplots(
        1, len(columns), figsize=(3 * len(columns) + 2, 1.2 + 0.36 * len(variants)), sharey=True
    )
    for axis, quantity in zip(axes, columns, strict=True):
        values = [quantity.scale * measured[v.name][quantity.key] for v in variants]
        axis.barh([label(v) for v in variants], values, color=[colour(v) for v in variants])
        ends = values
        if quantity.key == "latency_ms_per_image":
            low, ends = ([measured[v.name][key] for v in variants] for key in QUARTILES)
            axis.hlines(range(len(variants)), low, ends, color="#666666")
        texts = [quantity.show(dense[quantity.key])]
        for variant in variants[1:]:
            change = measured[variant.name][quantity.key] / dense[quantity.key] - 1
            texts.append(f"{100 * change:+.0f} %")
        for row, (end, text) in enumerate(zip(ends, texts, strict=True)):
            axis.annotate(
                text, (end, row), (5, 0), textcoords="offset points", va="center", size=8.5
            )
        axis.set(xlabel=quantity.name, xlim=(0, 1.3 * max(ends)))
        axis.grid(axis="y", visible=False)
        axis.xaxis.set_major_locator(MaxNLocator(4))
    axes[0].invert_yaxis()
    title = f"{model}: cost of each variant, and its change from dense ({dense['device']})"
    figure.suptitle(title, fontsize=13)
    return figure


def learning(results: Results, model: str) -> Figure:
    """Curves of mask learning (distortion, expected sparsity) and, if any, of retraining."""
    curves = {v: results.learning(model, v) for v in results.masks(model)}
    curves = {v: curve for v, curve in curves.items() if len(curve)}
    retrained = [v for v in results.shown(model) if v.retrain]
    figure, axes = plt.subplots(1, 2 + bool(retrained), figsize=(5 * (2 + bool(retrained)), 4))
    shades = plt.get_cmap("viridis")
    for number, (variant, curve) in enumerate(curves.items()):
        shade = {"color": shades(0.85 * number / max(len(curves) - 1, 1)), "linewidth": 1.6}
        smooth = curve["distortion"].rolling(10, min_periods=1).mean()
        axes[0].plot(curve["iteration"], curve["distortion"], **{**shade, "alpha": 0.25})
        axes[0].plot(curve["iteration"], smooth, label=label(variant), **shade)
        axes[1].plot(
            curve["iteration"], 100 * curve["expected_sparsity"], label=label(variant), **shade
        )
        if "target_sparsity" in curve:
            aim = 100 * curve["target_sparsity"]
            axes[1].plot(curve["iteration"], aim, linestyle=":", color=shade["color"])
    axes[0].set(title="Distortion (line: mean of 10)", ylabel="Relative squared error of z0")
    axes[1].set(
        title="Sparsity (dotted: target)", ylabel="Expected share removed (% of parameters)"
    )
    for axis in axes[:2]:
        axis.set_xlabel("Iteration of mask learning")
    decades(axes[0], "y")
    for variant in retrained:
        curve = results.retraining(model, variant)
        smooth = curve["loss"].rolling(20, min_periods=1).mean()
        axes[2].plot(curve["step"], curve["loss"], color=colour(variant), alpha=0.25)
        axes[2].plot(curve["step"], smooth, color=colour(variant), label=label(variant))
        axes[2].set(
            title="Retraining (line: mean of 20)",
            ylabel="Training loss (mean squared error)",
            xlabel="Step of retraining",
        )
    for axis in axes:
        if axis.get_lines():
            axis.legend()
    figure.suptitle(f"{model}: learning curves", fontsize=13)
    return figure


def mask_cost(results: Results, model: str) -> Figure:
    """Time and memory of one iteration of mask learning against the number of denoising steps.

    One line per share of steps that keep their activations; dotted: the floor of forward passes.
    """
    table = results.mask_cost(model)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    looks = [
        {"color": "#0072B2", "marker": "o"},
        {"color": "#009E73", "marker": "^"},
        {"color": "#D55E00", "marker": "s"},
    ]
    groups = table.groupby(table["kept"].map(_kept))
    for (name, rows), shape in zip(groups, cycle(looks), strict=False):
        axes[0].plot(rows["steps"], rows["seconds"], label=name, **shape)
        axes[0].plot(rows["steps"], rows["floor_seconds"], color=shape["color"], linestyle=":")
        axes[1].plot(rows["steps"], rows["peak_memory_mb"], label=name, **shape)
    axes[0].plot([], [], color="grey", linestyle=":", label="floor, by forward passes")
    axes[0].set(title="Time", ylabel="Seconds an iteration")
    axes[1].set(title="Memory", ylabel="Peak memory (MB)")
    for axis in axes:
        axis.set(xlabel="Denoising steps", xticks=sorted(set(table["steps"])))
        axis.set_ylim(bottom=0)
        axis.legend()
    figure.suptitle(f"{model}: one iteration of mask learning", fontsize=13)
    return figure


# The names of figures on the command line and in file names.
FIGURES: dict[str, Callable[[Results, str], Figure]] = {
    "quality": quality,
    "pictures": pictures.pictures,
    "removed": pictures.removed,
    "analysis": analysis.analysis,
    "learning": learning,
    "cost": cost,
    "mask-cost": mask_cost,
}


def draw(name: str, results: Results, model: str, folder: Path) -> None:
    """Draw a figure of `FIGURES` to `<folder>/<name>-<model>.png` and `.pdf`.

    Raises:
        UserError: there is no such figure or model, or a file that it needs is missing.
    """
    if name not in FIGURES:
        raise UserError(f"figure: {name!r} is not one of {', '.join(FIGURES)}")
    figure = FIGURES[name](results, model)
    save(figure, folder / f"{name}-{model}")


def save(figure: Figure, path: Path) -> None:
    """Write a figure to `<path>.png` and `<path>.pdf`, and close it."""
    for suffix in ("png", "pdf"):
        with atomic(path.with_name(f"{path.name}.{suffix}")) as file:
            figure.savefig(file)
    plt.close(figure)


def _kept(share: float) -> str:
    """The label of a share of steps that keep activations; labels sort in the order of shares."""
    if share == 0:
        return "all steps recomputed"
    return "all steps kept" if share == 1 else f"about {share:.0%} kept"


def _lines(variants: Iterable[Variant]) -> list[list[Variant]]:
    """Pruned variants grouped by everything but sparsity and seed, each sorted by sparsity."""
    lines: dict[str, list[Variant]] = {}
    for variant in variants:
        if not variant.is_dense:
            lines.setdefault(method(variant), []).append(variant)
    return [sorted(line, key=lambda variant: variant.percent) for line in lines.values()]


def _at_most(count: int, values: list[int]) -> list[int]:
    """At most `count` of the values, evenly chosen, so that tick labels do not overlap."""
    return values[:: -(-len(values) // count)] if values else []


def decades(axis: Axes, which: Literal["x", "y"]) -> None:
    """Make one axis logarithmic, with tick labels such as 0.01 instead of powers of ten."""
    axis.set(**{f"{which}scale": "log"})
    ticks = axis.xaxis if which == "x" else axis.yaxis
    low, high = ticks.get_view_interval()
    few = high / low < 20
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(
        FuncFormatter(lambda value, _: f"{value:g}") if few else NullFormatter()
    )


def _legend(source: Axes, free: list[Axes], figure: Figure) -> None:
    """Draw the legend of one panel in the first unused panel, or below the figure."""
    for axis in free:
        axis.set_axis_off()
    handles, names = source.get_legend_handles_labels()
    if free and len(names) <= FITTING:
        free[0].legend(handles, names, loc="center", fontsize=11)
    else:
        figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=11)
