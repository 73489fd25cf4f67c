"""What one iteration of mask learning costs, against the number of denoising steps."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import torch
from diffusers import DiffusionPipeline
from torch import nn

from ecodiff.config import MaskCostSettings
from ecodiff.evaluate.memory import peak_memory, tensors_of
from ecodiff.gates import Gates
from ecodiff.pipelines import Call, denoiser_of, encode, starting_noise
from ecodiff.rollout import frozen, rollout
from ecodiff.structures import count_parameters, discover

REPEATS = 3  # timed rounds whose median is reported, after the one that measures memory


def mask_cost(
    pipe: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    call: Call,
    settings: MaskCostSettings,
) -> pd.DataFrame:
    """Measures one iteration, forward and backward, with and without time-step checkpointing.

    Args:
        pipe: the dense pipeline, on the device to measure on.
        prompts, seeds: one batch of `settings.batch`.
        call: the `call` section of the model; its number of steps is replaced.

    Returns:
        A row for each number of steps and setting: steps (int), checkpoint (bool), seconds and
        peak_memory_mb (weights of the pipeline included; see `memory.peak_memory`). On a GPU that
        is too small for an iteration both are NaN.
    """
    denoiser, structures = denoiser_of(pipe), discover(pipe)
    embeds = encode(pipe, prompts, call)
    noise = starting_noise(pipe, seeds, call)
    gates = Gates(structures).to(noise.device)
    total, device = count_parameters(denoiser), str(noise.device)
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    held = [*tensors_of(*modules, gates), *embeds.values(), noise]

    def iteration(steps: int, checkpoint: bool) -> float:
        start = time.perf_counter()
        gates.draw(len(prompts), torch.Generator("cpu").manual_seed(0))
        with frozen(denoiser), gates.attached(denoiser):
            stepped = {**call, "num_inference_steps": steps}
            z0 = rollout(pipe, embeds, noise, stepped, checkpoint=checkpoint)
            # Any target costs the same.
            loss = (z0 - noise).square().mean() + sum(gates.expected_sparsity(total).values())
            loss.backward()
        gates.zero_grad()
        if noise.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    rows = []
    for steps in settings.steps:
        for checkpoint in (True, False):
            row = {"steps": steps, "checkpoint": checkpoint}
            try:
                one = lambda s=steps, c=checkpoint: iteration(s, c)  # noqa: E731
                row["peak_memory_mb"] = peak_memory(one, held, device)
                row["seconds"] = float(np.median([one() for _ in range(REPEATS)]))
            except torch.OutOfMemoryError:
                row |= {"peak_memory_mb": np.nan, "seconds": np.nan}
            rows.append(row)
    return pd.DataFrame(rows, columns=["steps", "checkpoint", "seconds", "peak_memory_mb"])
