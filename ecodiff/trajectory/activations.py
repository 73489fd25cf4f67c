"""The activation budget: for how many denoising steps the activations fit into memory."""

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

SHARE = 0.8  # of free memory; the rest is for the temporary tensors of single operations


def affordable_steps(
    pipe: DiffusionPipeline,
    embeds: dict[str, Tensor],
    noise: Tensor,
    call: Call,
    memory_mb: int | None = None,
) -> int:
    """How many steps can keep their activations, from 0 to all: `keep_steps` of `rollout`.

    Runs the denoiser once, as `rollout` will run it, and counts the bytes that autograd saves.
    Attach the gates and freeze the weights first, so that they are counted as they will be used.

    Args:
        pipe: the pipeline.
        embeds: prompt embeddings of one batch, each (n, ...).
        noise: starting noise of that batch, (n, ...).
        call: the other arguments of the pipeline's call.
        memory_mb: memory that activations may take, in 10^6 bytes; None: 80 % of what is free.
    """
    available = memory_mb * 1e6 if memory_mb else SHARE * free_memory(noise.device)
    per_step = runs_per_step(pipe, embeds) * _kept_bytes(pipe, embeds, noise, call)
    return min(len(pipe.scheduler.timesteps), int(available // per_step))


class _Measured(Exception):
    """Leaves the pipeline's loop after the first run of the denoiser."""


def _kept_bytes(
    pipe: DiffusionPipeline, embeds: dict[str, Tensor], noise: Tensor, call: Call
) -> int:
    """Bytes that autograd saves in one run of the denoiser, without the weights."""
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
        # The exception keeps the output alive, and with it all saved tensors: otherwise a freed
        # storage's address could be used again and be taken for one that was counted.
        raise _Measured(output)

    with suppress(_Measured), quiet(pipe), replaced_forward(denoiser, once):
        type(pipe).__call__.__wrapped__(pipe, **call_arguments(pipe, embeds, noise, call))
    return sum(kept.values())
