"""Methods ranked at each sparsity, by their means over seeds. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ecodiff.report.pages import write_table
from ecodiff.report.style import QUALITY, TARGET, Quantity
from ecodiff.report.tables import markdown
from ecodiff.runtime.artifacts import write_text

BY = "latent_error"
# Metrics of the overview, which shows sparsities side by side; all others are in the tables below.
OVERVIEW = {"latent_error", "latent_error_median", "scene_accuracy", "fid"}
KEYS = ["model", "target_sparsity", "method"]


def ranking(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation of each quality metric over seeds, ranked by latent error.

    Args:
        table: as `tables.main_table` returns it.

    Returns:
        One row per model, target_sparsity and method, without the dense model: rank (1 is the
        lowest mean latent error), seeds (their number), and for each metric its mean and, as
        `<metric>_std`, the sample standard deviation, NaN with one seed.
    """
    groups = table[table["target_sparsity"] > 0].groupby(KEYS, sort=False)
    found = groups.size().rename("seeds").to_frame()
    for metric in QUALITY:
        found[metric.key] = groups[metric.key].mean()
        found[f"{metric.key}_std"] = groups[metric.key].std()
    found = found.reset_index().sort_values(["model", "target_sparsity", BY], ignore_index=True)
    rank = found.groupby(["model", "target_sparsity"])[BY].rank(method="min").astype(int)
    found.insert(3, "rank", rank)
    return found


def write_ranking(table: pd.DataFrame, folder: Path, notes: str = "") -> None:
    """Write the ranking of a main table as `ranking.csv`, `ranking.md` and `ranking.html`.

    Args:
        table: as `tables.main_table` returns it.
        folder: where to write.
        notes: a paragraph for the end of `ranking.md` and `ranking.html`.
    """
    ranked = ranking(table)
    write_text(folder / "ranking.csv", ranked.to_csv(index=False))
    parts = []
    for model, rows in ranked.groupby("model", sort=False):
        parts.append(f"# {model}\n\n")
        for metric in (one for one in QUALITY if one.key in OVERVIEW):
            if rows[metric.key].notna().any():
                parts.append(f"{metric.title}:\n\n{markdown(side_by_side(rows, metric))}\n")
    for (model, sparsity), rows in ranked.groupby(["model", "target_sparsity"], sort=False):
        parts.append(f"# {model}, {sparsity:.0%} removed\n\n{markdown(readable(rows))}\n")
    write_text(folder / "ranking.md", "".join([*parts, notes]))
    shown = readable(ranked)
    shown.insert(0, "Model", ranked["model"])
    shown.insert(1, TARGET.name, ranked["target_sparsity"].map(TARGET.show))
    write_table(folder / "ranking.html", "Methods ranked by latent error", shown, notes)


def side_by_side(ranked: pd.DataFrame, metric: Quantity) -> pd.DataFrame:
    """One model's values of a metric as text: one row per method, one column per sparsity.

    Methods are sorted by their mean rank over sparsities; the best value of a column is bold.
    """
    order = ranked.groupby("method")["rank"].mean().sort_values(kind="stable").index
    shown = pd.DataFrame({"Method": order})
    for sparsity, rows in ranked.groupby("target_sparsity"):
        values = rows.set_index("method")[metric.key]
        best = values.max() if metric.better == "higher" else values.min()
        texts = {
            method: f"**{text}**" if values[method] == best else text
            for method, text in zip(values.index, _texts(rows, metric), strict=True)
        }
        shown[f"{sparsity:.0%}"] = [texts.get(method, "-") for method in order]
    return shown


def readable(ranked: pd.DataFrame) -> pd.DataFrame:
    """The ranking as text: means, with ± standard deviation where there are several seeds."""
    shown = ranked[["rank", "method"]].rename(columns=str.capitalize)
    for metric in QUALITY:
        if ranked[metric.key].notna().any():
            shown[metric.title] = _texts(ranked, metric)
    return shown


def _texts(ranked: pd.DataFrame, metric: Quantity) -> list[str]:
    """Each row's mean of a metric, with ± standard deviation where there are several seeds."""
    pairs = zip(ranked[metric.key], ranked[f"{metric.key}_std"], strict=True)
    return [
        metric.show(mean) if pd.isna(std) else f"{metric.show(mean)} ± {metric.show(std)}"
        for mean, std in pairs
    ]
