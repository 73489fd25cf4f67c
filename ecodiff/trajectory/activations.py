"""The activation budget: of how many denoising steps the activations fit into memory."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ecodiff.models.families import Call, runs_per_step
from ecodiff.models.pipelines import call_arguments, quiet
from ecodiff.models.structures import denoiser_of
from ecodiff.runtime.devices import free_memory
from ecodiff.trajectory.rollout import replaced_forward

SHARE = 0.8  # of free memory; the rest is for what a single operation needs


def affordable_steps(
    pipe: DiffusionPipeline,
    embeds: dict[str, Tensor],
    noise: Tensor,
    call: Call,
    memory_mb: int | None = None,
) -> int:
    """How many steps' activations may be kept, none to all; for `rollout`'s `keep_steps`.

    One step is run as the rollout will run it, gates and all, and what autograd keeps is counted.

    Args:
        memory_mb: what activations may take (10^6 bytes); without, most of what is free.
    """
    available = memory_mb * 1e6 if memory_mb else SHARE * free_memory(noise.device)
    per_step = runs_per_step(pipe, embeds) * _kept_bytes(pipe, embeds, noise, call)
    return min(len(pipe.scheduler.timesteps), int(available // per_step))


class _Measured(Exception):
    """One run of the denoiser is enough."""


def _kept_bytes(
    pipe: DiffusionPipeline, embeds: dict[str, Tensor], noise: Tensor, call: Call
) -> int:
    """Bytes that one run of the denoiser keeps for its backward pass, without the weights."""
    denoiser = denoiser_of(pipe)
    forward = denoiser.forward
    weights = {weight.untyped_storage()._cdata for weight in denoiser.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    def once(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(count, lambda tensor: tensor):
            output = forward(*args, **kwargs)
        # While the output lives, so does all that was counted: no storage is counted twice.
        raise _Measured(output)

    with suppress(_Measured), quiet(pipe), replaced_forward(denoiser, once):
        type(pipe).__call__.__wrapped__(pipe, **call_arguments(pipe, embeds, noise, call))
    return sum(kept.values())
