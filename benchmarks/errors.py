"""Latent errors of the variants of a run that are drawn so far: `python benchmarks/errors.py
results/compare`.

A table a model, a row a method: mean / median (10^-3) of the relative latent error at each
sparsity, averaged over the seeds in brackets, and `-` where nothing is drawn yet. It needs no
features of pictures, so it is there long before the tables of the run.
"""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd

from ecodiff.config.run import Config, load_config
from ecodiff.config.variants import Variant
from ecodiff.evaluate.samples import Samples
from ecodiff.report.style import method
from ecodiff.report.tables import markdown


def latents(run: Path, model: str, variant: Variant, prompts: str) -> np.ndarray | None:
    """The final latents of a variant, float64; None where no shard is drawn."""
    shards = [*(run / model / variant.name / "images" / prompts).glob("*/")]
    return Samples(shards).latents(slice(None)).double().numpy() if shards else None


def errors(run: Path, config: Config, model: str) -> pd.DataFrame:
    """A row a variant that is drawn: method, percent, mean and median of its error."""
    prompts = config.evaluate.prompts[0]
    dense = latents(run, model, Variant(), prompts)
    rows = []
    for variant in config.variants_of(model):
        found = latents(run, model, variant, prompts)
        if dense is None or found is None or len(found) < len(dense) or variant.is_dense:
            continue
        off = np.square(found - dense).reshape(len(dense), -1).mean(1) / dense.var()
        rows.append((method(variant), variant.percent, off.mean(), 1e3 * np.median(off)))
    return pd.DataFrame(rows, columns=["method", "percent", "mean", "median"])


def table(found: pd.DataFrame) -> pd.DataFrame:
    """A row a method, in the order of their mean rank where all of them are drawn."""
    cells = found.groupby(["method", "percent"]).agg(
        mean=("mean", "mean"), median=("median", "mean"), seeds=("mean", "size")
    )
    texts = [f"{c['mean']:.4f} / {c['median']:.2f} ({c['seeds']:.0f})" for _, c in cells.iterrows()]
    shown = pd.Series(texts, cells.index).unstack().fillna("-")
    ranks = cells["mean"].unstack().rank().mean(axis=1)
    shown = shown.loc[ranks.sort_values().index]
    return shown.rename(columns=lambda percent: f"{percent}%").reset_index()


def main() -> None:
    """Print one table a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="results/<run>")
    run = parser.parse_args().run
    config = load_config(run / "config.yaml")
    for model in config.models:
        print(f"{model}, {date.today()}\n\n{markdown(table(errors(run, config, model)))}")


if __name__ == "__main__":
    main()
