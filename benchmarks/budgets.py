"""What each budget gives: `python benchmarks/budgets.py results/compare toy-flux`.

A mask a budget (`mask.budget`: parameters, multiply-adds, time), pruned with least squares to
shares of it. A row a share: what went of parameters, multiply-adds and time, and the error on the
captions that the run evaluates. Needs the run's calibration and Gram matrices (`snakemake masks
--configfile ...` and a variant with compensation); measure on a quiet machine.
"""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path
from statistics import median

import pandas as pd
from diffusers import DiffusionPipeline
from masks import copy_of, errors, opened
from torch.utils.flop_counter import FlopCounterMode

import ecodiff
from ecodiff.calibrate import Calibration
from ecodiff.mask import make_mask
from ecodiff.models.structures import count_parameters, denoiser_of
from ecodiff.report.tables import markdown
from ecodiff.runtime.timing import seconds

BUDGETS = ("parameters", "macs", "latency")
SHARES = (0.1, 0.2, 0.3, 0.4)
SETTINGS = {"prompts": 25, "checkpoint": False}


def work_of(pipe: DiffusionPipeline, record: Calibration) -> int:
    """Multiply-adds of one picture, times two."""
    with FlopCounterMode(display=False) as counter:
        record.of([0]).drawn_by(pipe, 1)
    return counter.get_total_flops()


def row_of(
    pipe: DiffusionPipeline, pruned: DiffusionPipeline, record: Calibration, rounds: int
) -> list[str]:
    """Shares gone of parameters, multiply-adds and time, and mean / median (10^-3) error."""
    parameters = [count_parameters(denoiser_of(one)) for one in (pruned, pipe)]
    work = [work_of(one, record) for one in (pruned, pipe)]
    some, device = record.first(16), denoiser_of(pipe).device
    turns = [
        [seconds(lambda p=p: some.drawn_by(p, 16), device) for p in (pruned, pipe)]
        for _ in range(rounds)
    ]
    shares = [small / whole for small, whole in (parameters, work)]
    shares.append(median(small / whole for small, whole in turns))  # a slow spell meets both
    error = errors(pruned, record)
    return [
        *(f"{1 - share:.1%}" for share in shares),
        f"{error.mean():.4f} / {1e3 * error.quantile(0.5):.2f}",
    ]


def main() -> None:
    """Print one table, a row a budget and share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="results/<run>")
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    pipe, record, grams, held_out = opened(asked.run, asked.model)
    table = []
    for budget in BUDGETS:
        settings = SETTINGS | {"budget": budget}
        mask, _ = make_mask(pipe, "sensitivity", 0.1, calibration=record, settings=settings)
        for share in SHARES:
            pruned = copy_of(pipe)
            ecodiff.prune(pruned, mask.at(pipe, share), grams)
            name = f"{share:.0%} of {budget}"
            table.append([name, *row_of(pipe, pruned, held_out, asked.rounds)])
    print(f"{asked.model}, {len(held_out.prompts)} captions, least squares; {date.today()}\n")
    head = ["asked off", "parameters off", "multiply-adds off", "time off", "error"]
    print(markdown(pd.DataFrame(table, columns=head)))


if __name__ == "__main__":
    main()
