"""Ablations of mask learning, one setting changed at a time: a table and a figure. No torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ecodiff.config.ablations import DEFAULT, Ablation
from ecodiff.config.run import Config
from ecodiff.report.analysis import common
from ecodiff.report.drawing import decades, panels, save
from ecodiff.report.files import read_csv, read_mask
from ecodiff.report.style import Quantity
from ecodiff.report.tables import markdown
from ecodiff.runtime.artifacts import write_text
from ecodiff.runtime.errors import UserError

# The columns of errors: header and format.
ERRORS = {
    "median_error": Quantity("median_error", "Median error (10⁻³)", 1e3, better="lower"),
    "latent_error": Quantity("latent_error", "Mean error", digits=".4f", better="lower"),
}
COLUMNS = ["model", "setting", "value", "sparsity", *ERRORS, "seconds", "common"]


def ablation_table(config: Config, run: Path) -> pd.DataFrame:
    """The table of a sweep, one row per model, mask and sparsity.

    Args:
        config: the run's config.
        run: its folder, `results/<run>`.

    Returns:
        model, setting, value (str; empty for the default), sparsity (at which the mask is judged),
        median_error and latent_error (relative latent error over prompts, see
        `evaluate.mask_error`), seconds (of learning) and common (share of removed units in common
        with the default mask, each at the sparsity it was learned for, see `analysis.common`).

    Raises:
        UserError: the config has no section `ablations`, or a file is missing or damaged.
    """
    if config.ablations is None:
        raise UserError(f"{run / 'config.yaml'}: ablations is null")
    rows = []
    for model in config.models:
        folder = run / model / "ablations"
        errors = read_csv(folder / "mask_error.csv", ["mask", "sparsity", *ERRORS])
        errors = errors.set_index(["mask", "sparsity"])
        points = config.ablations_of(model)
        default = _gone(folder, points[0])
        for point in points:
            shared = common(_gone(folder, point), default)
            seconds = read_csv(folder / point.name / "history.csv", ["seconds"])["seconds"].sum()
            value = "" if point.setting == DEFAULT else str(point.value)
            for sparsity, found in errors.loc[point.name].iterrows():
                both = [found[key] for key in ERRORS]
                rows.append([model, point.setting, value, sparsity, *both, seconds, shared])
    return pd.DataFrame(rows, columns=COLUMNS)


def write_ablations(table: pd.DataFrame, run: Path) -> None:
    """Write `tables/ablations.csv` and `.md`, `figures/ablations.png` and `.pdf`."""
    write_text(run / "tables/ablations.csv", table.to_csv(index=False))
    text = "".join(
        f"# Mask learning on {model}, one setting changed at a time\n\n{markdown(readable(rows))}\n"
        for model, rows in table.groupby("model", sort=False)
    )
    write_text(run / "tables/ablations.md", text)
    save(draw(table), run / "figures/ablations")


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """One model's rows as text, one row per setting and value, sparsities side by side."""
    keys = ["setting", "value", "seconds", "common"]
    order = pd.MultiIndex.from_frame(table[keys].drop_duplicates())
    wide = table.set_index([*keys, "sparsity"])[[*ERRORS]].unstack().reindex(order)
    shown = pd.DataFrame({"Setting": wide.index.get_level_values("setting")})
    shown["Value"] = wide.index.get_level_values("value")
    for key, quantity in ERRORS.items():
        for sparsity, errors in wide[key].items():
            shown[f"{quantity.title} at {sparsity:.0%}"] = [quantity.show(e) for e in errors]
    same = wide.index.get_level_values("common")
    shown["Removed units in common with default (%)"] = [f"{100 * share:.0f}" for share in same]
    shown["Learning (s)"] = [f"{s:.0f}" for s in wide.index.get_level_values("seconds")]
    return shown


def draw(table: pd.DataFrame) -> Figure:
    """The figure: one panel per model, one row per setting and value, one marker per sparsity.

    Dotted lines are at the default mask's errors.
    """
    labels = [f"{s} {v}".strip().replace("_", " ") for s, v in zip(*_points(table), strict=True)]
    models, sparsities = table["model"].unique(), table["sparsity"].unique()
    shades = plt.get_cmap("viridis")
    figure, axes = panels(1, len(models), 0.9 + 0.16 * len(labels), sharey=True)
    for axis, model in zip(axes[0], models, strict=True):
        for number, sparsity in enumerate(sparsities):
            chosen = table[(table["model"] == model) & (table["sparsity"] == sparsity)]
            errors = chosen["median_error"].tolist()
            shade = shades(0.85 * number / max(1, len(sparsities) - 1))
            axis.plot(errors, range(len(errors)), "o", color=shade, label=f"{sparsity:.0%} removed")
            axis.axvline(errors[0], color=shade, linestyle=":", linewidth=1)
        axis.set(title=model, xlabel="Relative latent error\n(median over prompts)")
        decades(axis, "x")
    settings = _points(table)[0]
    for row in range(1, len(settings)):
        if settings[row] != settings[row - 1]:
            for axis in axes[0]:
                axis.axhline(row - 0.5, color="#cccccc", linewidth=0.8)
    axes[0][0].set_yticks(range(len(labels)), labels)
    axes[0][0].invert_yaxis()
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(sparsities)
    )
    figure.suptitle("Mask learning, one setting changed at a time (dotted: default)")
    return figure


def _gone(folder: Path, point: Ablation) -> np.ndarray:
    """The units that a mask of the sweep removes, of all structures: bool (units,)."""
    kept, _ = read_mask(folder / point.name / "mask.safetensors")
    return ~np.concatenate([kept[name] for name in sorted(kept)])


def _points(table: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Settings and values of the sweep, two lists of the same length, in its order."""
    points = table.drop_duplicates(["setting", "value"])
    return points["setting"].tolist(), points["value"].tolist()
