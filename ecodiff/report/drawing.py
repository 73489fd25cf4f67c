"""How all figures are drawn: as wide as a column of text, with letters as large as its captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import ScaledTranslation

from ecodiff.runtime.artifacts import atomic

WIDTH = 5.5  # inches: the text of an ICLR or NeurIPS page
BELOW = 0.38  # inches below a panel for ticks and the name of its axis
plt.rcParams.update(
    {
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.w_pad": 0.07,  # inches
        "savefig.dpi": 220,
        "font.size": 7.5,
        "axes.titlesize": 8,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "grid.linewidth": 0.5,
        "legend.frameon": False,
        "legend.fontsize": 6.5,
        "figure.titlesize": 8.5,
        "lines.linewidth": 1.0,
        "lines.markersize": 3.5,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "pdf.fonttype": 42,  # TrueType, embedded: text can be selected, and publishers take it
    }
)


def panels(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure of a column's width with axes as `plt.subplots` gives them: (rows, columns).

    Args:
        rows: of axes.
        columns: of axes.
        height: of the figure, inches.
        options: for `plt.subplots`.
    """
    return plt.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False, **options)


def save(figure: Figure, path: Path) -> None:
    """Write a figure to `<path>.png` and `<path>.pdf`, and close it."""
    for suffix in ("png", "pdf"):
        with atomic(path.with_name(f"{path.name}.{suffix}")) as file:
            figure.savefig(file)
    plt.close(figure)


def decades(axis: Axes, which: Literal["x", "y"]) -> None:
    """Make one axis logarithmic, with tick labels such as 0.01 instead of powers of ten."""
    axis.set(**{f"{which}scale": "log"})
    ticks = axis.xaxis if which == "x" else axis.yaxis
    low, high = ticks.get_view_interval()
    digits = "123456789" if high / low < 3 else "125" if high / low < 20 else ""
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in digits else "")
    )


def legend_below(axis: Axes) -> None:
    """The legend of a panel below it, where it hides nothing."""
    if axis.get_legend_handles_labels()[0]:
        figure = axis.get_figure()
        below = ScaledTranslation(0, -BELOW, figure.dpi_scale_trans)
        place = {"bbox_to_anchor": (0.5, 0), "bbox_transform": axis.transAxes + below}
        axis.legend(loc="upper center", borderaxespad=0, **place)
