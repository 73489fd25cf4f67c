"""Speed, memory and size of pruned SDXL and FLUX.1, with random weights.

Run `python benchmarks/pruned_size.py` on a GPU; `--small` checks the script itself on any machine.
Random units are removed: the cost depends only on their number, and on whether feed-forwards keep a
multiple of 64 neurons (`aligned`), which suits tensor cores.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import DiffusionPipeline
from real_size import asked_for, built, call_of, show, texts_of

import ecodiff
from ecodiff.evaluate.memory import peak_memory, tensors_of
from ecodiff.mask.scores import random
from ecodiff.models.families import Call
from ecodiff.models.pipelines import denoise, starting_noise
from ecodiff.models.structures import count_parameters, denoiser_of, discover
from ecodiff.runtime.timing import seconds

VARIANTS = [(0.0, 1), (0.2, 1), (0.2, 64), (0.3, 1), (0.3, 64)]  # sparsity, align
STEPS = 4


def pruned(name: str, device: str, small: bool, sparsity: float, align: int) -> DiffusionPipeline:
    """A real model's architecture with random units removed up to a sparsity."""
    pipe = built(name, device, small)
    denoiser = denoiser_of(pipe)
    structures, total = discover(denoiser), count_parameters(denoiser)
    if sparsity:
        scores = random(structures, seed=0)
        ecodiff.prune(pipe, ecodiff.select(structures, scores, sparsity, total, align=align))
    return pipe


def measured(pipe: DiffusionPipeline, call: Call, repeats: int) -> dict[str, float]:
    """Parameters (10^9), milliseconds per denoising step (median), peak memory and disk (GB)."""
    denoiser = denoiser_of(pipe)
    embeds, noise = texts_of(pipe), starting_noise(pipe, [0], call)

    def draw() -> None:
        denoise(pipe, embeds, noise, call)

    peak = peak_memory(draw, tensors_of(denoiser), str(denoiser.device))
    times = [seconds(draw, noise.device) for _ in range(repeats)]
    with tempfile.TemporaryDirectory() as folder:
        denoiser.save_pretrained(folder)
        disk = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    return {
        "parameters (B)": count_parameters(denoiser) / 1e9,
        "ms a step": 1e3 * float(np.median(times)) / STEPS,
        "peak GB": peak / 1e3,
        "disk GB": disk / 1e9,
    }


def main() -> None:
    """Measure and print one table."""
    asked = asked_for(__doc__, repeats=5)
    rows = []
    for name in asked.models:
        call = {**call_of(name, asked.side), "num_inference_steps": STEPS}
        for sparsity, align in VARIANTS:
            pipe = pruned(name, asked.device, asked.small, sparsity, align)
            row = {"model": name, "sparsity": sparsity, "aligned": align > 1}
            rows.append(row | measured(pipe, call, asked.repeats))
            del pipe
            if asked.device == "cuda":
                torch.cuda.empty_cache()
    table = pd.DataFrame(rows)
    dense = table[table["sparsity"] == 0].set_index("model")["ms a step"]
    table["of dense time"] = table["ms a step"] / table["model"].map(dense)
    show(table.round(3), asked)


if __name__ == "__main__":
    main()
