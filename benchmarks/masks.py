"""What a mask's quality takes: `python benchmarks/masks.py results/compare toy-flux`.

Ways to score are compared at the same sparsities, pruned with least squares, on the captions that
the run evaluates: how prompts are averaged, how many there are, by channels or by rank, and what
learning adds. Passes are counted: one is a trajectory forward and back, three forward passes (F)
with checkpointing. Needs the run's calibration (`snakemake masks --configfile ...`).
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import ecodiff
from ecodiff.calibrate import Calibration, calibrate
from ecodiff.calibrate.grams import Grams
from ecodiff.config.run import load_config
from ecodiff.config.sections import MaskSettings
from ecodiff.mask import Mask, make_mask
from ecodiff.mask.sensitivity import costs_of_share, squared_gradients
from ecodiff.models.loading import load_pipeline
from ecodiff.models.pipelines import fingerprint
from ecodiff.models.structures import (
    Modulation,
    count_parameters,
    denoiser_of,
    discover,
    maskable_share,
    modulation_of,
)
from ecodiff.prompts import read_prompts
from ecodiff.report.tables import markdown

BATCH = 64
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5)
# What a prompt weighs, by its sum over all units.
MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.ones_like,
    "mean, each over its total": torch.reciprocal,
    "mean, each over the root of its total": torch.rsqrt,
}
# Prompts of the start, iterations, prompts an iteration, loss.
LEARNED = {
    "learned": (25, 12, 2, "end-to-end"),
    "learned, loss a step": (25, 12, 2, "per-step"),
    "learned for longer": (100, 50, 8, "end-to-end"),
}
F = {"end-to-end": 3, "per-step": 4}  # forward passes a pass; the targets a step take one more


def averaged(
    pipe: DiffusionPipeline,
    record: Calibration,
    count: int,
    modulation: Modulation,
    weigh: Callable[[Tensor], Tensor],
) -> Mask:
    """The mask of sensitivities, averaged over the first `count` prompts with given weights."""
    record, settings = record.first(count), MaskSettings(modulation=modulation)
    how = {"batch": 5, "checkpoint": False, "means": record.means, "modulation": modulation}
    parts = [*squared_gradients(pipe, record, **how)]
    squares = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    weights = weigh(torch.stack([values.sum(1) for values in squares.values()]).sum(0))
    found = {name: weights / weights.sum() @ values for name, values in squares.items()}
    structures, total = discover(pipe, modulation), count_parameters(denoiser_of(pipe))
    scores = costs_of_share(structures, found, total)
    moments = record.moments if modulation == "rank" else {}
    info = {"settings": settings.model_dump()}
    whole = {name: torch.ones(len(values), dtype=torch.bool) for name, values in scores.items()}
    return Mask(scores, whole, fingerprint(pipe), info, dict(record.means), dict(moments))


def learned(
    pipe: DiffusionPipeline,
    record: Calibration,
    prompts: int,
    iterations: int,
    batch: int,
    loss: str,
) -> Mask:
    """A mask that is learned for 40 %, by rank."""
    settings = {"prompts": prompts, "iterations": iterations, "batch": batch, "loss": loss}
    settings |= {"lr": dict.fromkeys(("heads", "neurons", "modulation"), 0.2), "checkpoint": False}
    return make_mask(pipe, "ecodiff", 0.4, calibration=record, settings=settings)[0]


def judged(pipe: DiffusionPipeline, mask: Mask, grams: Grams, record: Calibration) -> list[str]:
    """Mean / median (10^-3) of the relative latent error at each sparsity, pruned."""
    row = []
    structures = discover(pipe, modulation_of(mask.scores))
    most = maskable_share(structures, count_parameters(denoiser_of(pipe)))
    for sparsity in SPARSITIES:
        if sparsity > most - 0.01:  # all masks would be one
            row.append("")
            continue
        pruned = copy_of(pipe)
        ecodiff.prune(pruned, mask.at(pipe, sparsity), grams)
        error = errors(pruned, record)
        row.append(f"{error.mean():.4f} / {1e3 * error.quantile(0.5):.2f}")
    return row


def errors(pruned: DiffusionPipeline, record: Calibration) -> Tensor:
    """The relative latent error of each prompt of a dense model's record, float64."""
    dense = record.z0.double()
    error = (record.drawn_by(pruned, BATCH).double() - dense).square().flatten(1).mean(1)
    return error / dense.var(correction=0)


class Run(NamedTuple):
    """What a run has of a model: the dense pipeline, its calibration and Gram matrices, and the
    record of the first 128 prompts that the run evaluates."""

    pipe: DiffusionPipeline
    record: Calibration
    grams: Grams
    held_out: Calibration


def opened(run: Path, name: str) -> Run:
    """Load the model `name` of `results/<run>`, on the CPU, and draw the held-out prompts."""
    config = load_config(run / "config.yaml")
    model = config.models[name]
    call = model.call.model_dump(exclude_none=True)
    pipe = load_pipeline(model.source, **model.load.model_dump() | {"device": "cpu"})
    record = Calibration.load(run / name / f"{config.calibrate.prompts}.safetensors")
    rows = read_prompts(run / f"prompts/{config.evaluate.prompts[0]}.parquet")[:128]
    held_out = calibrate(pipe, [*rows["prompt"]], [*rows["seed"]], call, BATCH)
    return Run(pipe, record, Grams.load(run / name / "grams"), held_out)


def copy_of(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline with a denoiser of its own."""
    denoiser = denoiser_of(pipe)
    name = next(n for n, part in pipe.components.items() if part is denoiser)
    again = type(pipe)(**{**pipe.components, name: copy.deepcopy(denoiser)})
    again.set_progress_bar_config(disable=True)
    return again


def main() -> None:
    """Print one table, a row a way to score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="results/<run>")
    parser.add_argument("model")
    asked = parser.parse_args()
    pipe, record, grams, held_out = opened(asked.run, asked.model)
    ways = {
        (f"by {units}, {name}", count, 3 * count): (averaged, count, units, weigh)
        for units in ("channels", "rank")
        for name, weigh in MEANS.items()
        for count in (100, 25)
        if units == "channels" or weigh is torch.rsqrt
    } | {
        (f"by rank, {name}", n + i * b, 3 * n + F[loss] * i * b): (learned, n, i, b, loss)
        for name, (n, i, b, loss) in LEARNED.items()
    }
    table = []
    for (name, passes, forward), (score, *arguments) in ways.items():
        print(f"{name}, {passes} passes ...", file=sys.stderr, flush=True)
        mask = score(pipe, record, *arguments)
        table.append([name, passes, forward, *judged(pipe, mask, grams, held_out)])
    print(f"{asked.model}, {len(held_out.prompts)} captions, least squares; {date.today()}\n")
    shares = [f"{share:.0%}" for share in SPARSITIES]
    print(markdown(pd.DataFrame(table, columns=["scores", "passes", "F", *shares])))


if __name__ == "__main__":
    main()
