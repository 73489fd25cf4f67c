"""The denoising trajectory as one differentiable function, with the memory of a single step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_again_in_backward

from ecodiff.models.families import Call, runs_per_step
from ecodiff.models.pipelines import call_arguments, quiet
from ecodiff.models.structures import denoiser_of
from ecodiff.runtime.errors import UserError

# Denoisers are in eval mode and draw no random numbers, so no RNG state is worth keeping.
recompute = partial(run_again_in_backward, use_reentrant=False, preserve_rng_state=False)


def rollout(
    pipe: DiffusionPipeline,
    embeds: dict[str, Tensor],
    noise: Tensor,
    call: Call,
    *,
    checkpoint: bool = True,
    keep_steps: int = 0,
    debug: bool = False,
) -> Tensor:
    """Run the pipeline's own loop from noise to z0, differentiably (EcoDiff, time-step gradient
    checkpointing).

    With `checkpoint`, each step keeps only its latent and is computed again in the backward pass,
    except for the last `keep_steps`: their activations stay, which saves their recomputation.
    Keeping the *last* steps is free of extra peak memory for one, since they go back first.
    Gradients equal full backpropagation. Wrap this *and* the backward pass in `frozen`, which
    spares the gradients of weights.

    Returns z0 with the shape and dtype of `noise`. With `debug`, the backward pass raises
    `UserError` when a step, computed again, does not give its first prediction to the bit.
    """
    denoiser = denoiser_of(pipe)
    forward, runs, called = denoiser.forward, runs_per_step(pipe, embeds), 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        called += 1
        if called > runs * (len(pipe.scheduler.timesteps) - keep_steps):
            return forward(*args, **kwargs)
        if debug:
            return recompute(_repeatable(forward, called), *args, early_stop=False, **kwargs)
        return recompute(forward, *args, **kwargs)

    # Only the denoiser is wrapped: the scheduler's scaling and step counter stay outside, so a
    # recomputed step sees the very latent that was stored.
    loop = type(pipe).__call__.__wrapped__
    with quiet(pipe), replaced_forward(denoiser, step if checkpoint else forward):
        return loop(pipe, **call_arguments(pipe, embeds, noise, call))[0].to(noise.dtype)


@dataclass(frozen=True)
class DenseStep:
    """One call of the denoiser on its own trajectory.

    Attributes:
        args, kwargs: what it was called with.
        prediction: what it answered, (n, ...); the output's first tensor.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prediction: Tensor

    def again(self, denoiser: nn.Module) -> Tensor:
        """The prediction of a denoiser, such as a gated one, on the same input.

        Its activations are computed again in the backward pass.
        """
        return _prediction(recompute(denoiser, *self.args, **self.kwargs))


@torch.no_grad()
def dense_steps(
    pipe: DiffusionPipeline, embeds: dict[str, Tensor], noise: Tensor, call: Call
) -> list[DenseStep]:
    """Record each call of the denoiser from noise to z0 (EcoDiff, ablation "per-step loss")."""
    forward = denoiser_of(pipe).forward
    steps: list[DenseStep] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        steps.append(DenseStep(args, kwargs, _prediction(output)))
        return output

    with quiet(pipe), replaced_forward(denoiser_of(pipe), record):
        pipe(**call_arguments(pipe, embeds, noise, call))
    return steps


def _repeatable(forward: Callable[..., Any], number: int) -> Callable[..., Any]:
    """A denoiser's forward that fails when its second prediction is not its first."""
    first: list[Tensor] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        prediction = _prediction(output).detach()
        if first and not torch.equal(first[0], prediction):
            difference = (first[0] - prediction).abs().max().item()
            raise UserError(
                f"mask.debug: step {number}, computed again, differs by up to {difference:.3g};"
                " something in the model is random or keeps a state"
            )
        first.append(prediction)
        return output

    return call


def _prediction(output: Any) -> Tensor:
    """The first tensor of a denoiser's output; a list of latents (Z-Image) is laid together."""
    first = output[0]
    return torch.stack(first) if isinstance(first, list) else first


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Switch off the gradients of a module's parameters, then restore each one's own setting.

    Must span the backward pass too: a recomputed step has to see what the first pass saw.
    """
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Call `forward` where the module is called, then restore what was there."""
    own = module.__dict__.get("forward")  # set when a library has hooked the instance
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
