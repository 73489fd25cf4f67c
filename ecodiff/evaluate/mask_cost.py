"""What one iteration of mask learning costs, against the number of denoising steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ecodiff.config.sections import MaskCostSettings
from ecodiff.evaluate.memory import peak_memory, tensors_of
from ecodiff.models.families import Call
from ecodiff.models.structures import count_parameters, denoiser_of, discover
from ecodiff.runtime import timing
from ecodiff.trajectory.gates import Gates
from ecodiff.trajectory.rollout import frozen, rollout

COLUMNS = ["steps", "kept", "seconds", "floor_seconds", "peak_memory_mb"]


def mask_cost(
    pipe: DiffusionPipeline,
    embeds: dict[str, Tensor],
    noise: Tensor,
    call: Call,
    settings: MaskCostSettings,
) -> pd.DataFrame:
    """Measures one iteration, forward and backward, as more and more steps keep their activations.

    Args:
        pipe: the dense pipeline, on the device to measure on.
        embeds, noise: of one batch of prompts, see `pipelines.encode` and `starting_noise`.
        call: the `call` section of the model; its number of steps is replaced.

    Returns:
        A row for each number of steps and share of them that is kept: steps (int), kept (the share
        in whole steps; 0 is time-step checkpointing of all), seconds (median), floor_seconds and
        peak_memory_mb (weights of the pipeline included; see `memory.peak_memory`). The floor is
        a forward pass, its gradient and the recomputation of what is not kept: (3 - kept) times a
        forward pass alone, timed in the same rounds. On a GPU that is too small for an iteration
        times and memory are NaN.
    """
    denoiser, structures = denoiser_of(pipe), discover(pipe)
    gates = Gates(structures).to(noise.device)
    total, device = count_parameters(denoiser), str(noise.device)
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    held = [*tensors_of(*modules, gates), *embeds.values(), noise]

    def forward(steps: int) -> None:
        gates.draw(len(noise), torch.Generator("cpu").manual_seed(0))
        with torch.no_grad(), gates.attached(denoiser):
            rollout(pipe, embeds, noise, {**call, "num_inference_steps": steps})

    def iteration(steps: int, keep: int) -> None:
        gates.draw(len(noise), torch.Generator("cpu").manual_seed(0))
        stepped = {**call, "num_inference_steps": steps}
        with frozen(denoiser), gates.attached(denoiser):
            z0 = rollout(pipe, embeds, noise, stepped, keep_steps=keep)
            # Any target costs the same.
            loss = (z0 - noise).square().mean() + sum(gates.expected_sparsity(total).values())
            loss.backward()
        gates.zero_grad()

    rows = []
    for steps in settings.steps:
        # What is measured at this number of steps; None is the forward pass alone.
        works: dict[int | None, Callable[[], None]] = {None: partial(forward, steps)}
        for keep in sorted({round(share * steps) for share in settings.kept}):
            works[keep] = partial(iteration, steps, keep)
        peaks = {k: _or_nan(partial(peak_memory, works[k], held, device)) for k in works}
        rounds = [
            {k: _or_nan(partial(timing.seconds, works[k], noise.device)) for k in works}
            for _ in range(settings.repeats)
        ]
        seconds = {k: float(np.median([one[k] for one in rounds])) for k in works}
        forward_seconds = seconds.pop(None)
        rows += [
            {
                "steps": steps,
                "kept": keep / steps,
                "seconds": seconds[keep],
                "floor_seconds": (3 - keep / steps) * forward_seconds,
                "peak_memory_mb": peaks[keep],
            }
            for keep in seconds
        ]
    return pd.DataFrame(rows, columns=COLUMNS)


def _or_nan(measure: Callable[[], float]) -> float:
    """What is measured, or NaN where it does not fit into the GPU."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return np.nan
