"""Figures of what variants cost, and of what learning a mask costs."""

from __future__ import annotations

import textwrap
from itertools import cycle

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ecodiff.report.drawing import legend_below, panels
from ecodiff.report.results import QUARTILES, Results
from ecodiff.report.style import COST, colour, label
from ecodiff.runtime.errors import UserError

ROW = 0.17  # inches of a variant's bar


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
    figure, axes = panels(1, len(columns), 0.9 + ROW * len(variants), sharey=True)
    for axis, quantity in zip(axes[0], columns, strict=True):
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
            axis.annotate(text, (end, row), (2, 0), textcoords="offset points", va="center", size=6)
        axis.set_xlabel("\n".join(textwrap.wrap(quantity.name, 11)), fontsize=6.5)
        axis.set_xlim(0, 1.7 * max(ends))
        axis.grid(axis="y", visible=False)
        axis.xaxis.set_major_locator(MaxNLocator(2))
    axes[0, 0].invert_yaxis()
    axes[0, 0].margins(y=0.5 / len(variants))
    figure.suptitle(f"{model}: cost of each variant, change from dense ({dense['device']})")
    return figure


def mask_cost(results: Results, model: str) -> Figure:
    """Time and memory of one iteration of mask learning against the number of denoising steps.

    One line per share of steps that keep their activations; dotted: the floor of forward passes.
    """
    table = results.mask_cost(model)
    figure, axes = panels(1, 2, 2.6)
    time, memory = axes[0]
    looks = [
        {"color": "#0072B2", "marker": "o"},
        {"color": "#009E73", "marker": "^"},
        {"color": "#D55E00", "marker": "s"},
    ]
    groups = table.groupby(table["kept"].map(_kept))
    for (name, rows), shape in zip(groups, cycle(looks), strict=False):
        time.plot(rows["steps"], rows["seconds"], label=name, **shape)
        time.plot(rows["steps"], rows["floor_seconds"], color=shape["color"], linestyle=":")
        memory.plot(rows["steps"], rows["peak_memory_mb"], label=name, **shape)
    time.plot([], [], color="grey", linestyle=":", label="floor, by forward passes")
    time.set(title="Time", ylabel="Seconds an iteration")
    memory.set(title="Memory", ylabel="Peak memory (MB)")
    for axis in axes[0]:
        axis.set(xlabel="Denoising steps", xticks=sorted(set(table["steps"])))
        axis.set_ylim(bottom=0)
        legend_below(axis)
    figure.suptitle(f"{model}: one iteration of mask learning")
    return figure


def _kept(share: float) -> str:
    """The label of a share of steps that keep activations; labels sort in the order of shares."""
    if share == 0:
        return "all steps recomputed"
    return "all steps kept" if share == 1 else f"about {share:.0%} kept"
