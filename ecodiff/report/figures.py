"""The figures of a run: each is a function of its results and a model name. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from ecodiff.report import analysis, costs, curves, pictures
from ecodiff.report.drawing import save
from ecodiff.report.results import Results
from ecodiff.runtime.errors import UserError

# The names of figures on the command line and in file names.
FIGURES: dict[str, Callable[[Results, str], Figure]] = {
    "quality": curves.quality,
    "pictures": pictures.pictures,
    "removed": pictures.removed,
    "analysis": analysis.analysis,
    "learning": curves.learning,
    "cost": costs.cost,
    "mask-cost": costs.mask_cost,
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
