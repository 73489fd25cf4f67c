"""Methods ranked at each sparsity, over the seeds they were run with. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ecodiff.artifacts import write_text
from ecodiff.report.style import QUALITY, Quantity
from ecodiff.report.tables import markdown

BY = "latent_error"
KEYS = ["model", "target_sparsity", "method"]


def ranking(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation of each quality metric over seeds, best latent error first.

    Args:
        table: of `tables.main_table`.

    Returns:
        A row a model, target_sparsity and method (no dense ones): rank (1 is best), seeds (how
        many), and for each metric its mean and, as `<metric>_std`, the deviation of the sample;
        NaN for one seed.
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


def write_ranking(table: pd.DataFrame, folder: Path) -> None:
    """Write `ranking.csv` and `ranking.md` of a main table to a folder."""
    ranked = ranking(table)
    write_text(folder / "ranking.csv", ranked.to_csv(index=False))
    parts = [
        f"# {model}, {sparsity:.0%} removed\n\n{markdown(readable(rows))}\n"
        for (model, sparsity), rows in ranked.groupby(["model", "target_sparsity"], sort=False)
    ]
    write_text(folder / "ranking.md", "".join(parts))


def readable(ranked: pd.DataFrame) -> pd.DataFrame:
    """Rows as text: mean, and deviation where there are several seeds."""
    shown = ranked[["rank", "method"]].rename(columns=str.capitalize)
    for metric in QUALITY:
        if ranked[metric.key].notna().any():
            pairs = zip(ranked[metric.key], ranked[f"{metric.key}_std"], strict=True)
            shown[metric.title] = [_text(metric, mean, std) for mean, std in pairs]
    return shown


def _text(metric: Quantity, mean: float, std: float) -> str:
    return metric.show(mean) if pd.isna(std) else f"{metric.show(mean)} ± {metric.show(std)}"
