"""Whether a latency budget is met: `python benchmarks/latency.py`.

The middle model of `benchmarks/learning.py`, an SDXL-shaped U-Net of 48M parameters, is pruned to
shares of its time by what `mask.budget: latency` measured, and timed beside the dense one by turns.
"""

from __future__ import annotations

import argparse
import copy
from datetime import date
from statistics import median

import pandas as pd
from learning import PROMPT, middle

import ecodiff
from ecodiff.calibrate import calibrate
from ecodiff.mask import make_mask
from ecodiff.models.structures import count_parameters, denoiser_of
from ecodiff.report.tables import markdown
from ecodiff.runtime.timing import seconds

CALL = {"num_inference_steps": 1, "guidance_scale": 3.0, "height": 256, "width": 256}


def main() -> None:
    """Print one table, a row a budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.05, 0.1, 0.15])
    parser.add_argument("--rounds", type=int, default=11)
    asked = parser.parse_args()
    pipe = middle()
    pipe.set_progress_bar_config(disable=True)
    calibration = calibrate(pipe, [PROMPT], [0], CALL, 1)
    settings = {"budget": "latency"}
    mask, _ = make_mask(
        pipe, "random", min(asked.budgets), calibration=calibration, settings=settings
    )
    rows = []
    for budget in asked.budgets:
        unet = copy.deepcopy(pipe.unet)
        small = type(pipe)(**{**pipe.components, "unet": unet})
        small.set_progress_bar_config(disable=True)
        ecodiff.prune(small, mask.at(pipe, budget))
        turns = [
            [seconds(lambda p=p: calibration.drawn_by(p, 1), unet.device) for p in (pipe, small)]
            for _ in range(asked.rounds)
        ]
        dense, pruned = (median(times) for times in zip(*turns, strict=True))
        off = 1 - median(after / before for before, after in turns)  # a slow spell meets both
        gone = 1 - count_parameters(denoiser_of(small)) / count_parameters(denoiser_of(pipe))
        times = (f"{1e3 * dense:.0f}", f"{1e3 * pruned:.0f}", f"{off:.1%}")
        rows.append([f"{budget:.0%}", f"{gone:.1%}", *times])
    head = ["latency asked off", "parameters off", "dense (ms)", "pruned (ms)", "latency off"]
    print(f"{date.today()}\n\n{markdown(pd.DataFrame(rows, columns=head))}")


if __name__ == "__main__":
    main()
