"""The whole denoising loop as one differentiable function, in the memory of a single step."""

from __future__ import annotations

import inspect
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
from ecodiff.models.libraries import without_compiling
from ecodiff.models.pipelines import call_arguments, quiet
from ecodiff.models.structures import denoiser_of
from ecodiff.runtime.errors import UserError
from ecodiff.trajectory.denoising_loss import objective

# Denoisers are in eval mode and draw no random numbers, so the RNG state need not be restored for
# the recomputation.
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
    """Run the pipeline's own loop from noise to z0, differentiably (EcoDiff, "time-step gradient
    checkpointing").

    Gradients equal those of full backpropagation. Wrap this and the backward pass in `frozen`, so
    that no gradients of weights are computed.

    Args:
        pipe: the pipeline; its denoiser may be gated.
        embeds: prompt embeddings as keyword arguments of the call, each (n, ...).
        noise: starting noise (n, ...), in the layout of the pipeline's latents.
        call: the other arguments of the pipeline's call.
        checkpoint: keep only the latent of each step and recompute the step in the backward pass.
            Costs three forward passes a step instead of two, and the memory of one step instead of
            all.
        keep_steps: with `checkpoint`, this many last steps keep their activations and are not
            recomputed. Keeping one needs no extra peak memory: the backward pass starts with the
            last step and holds its activations in any case.
        debug: with `checkpoint`, compare each recomputed prediction with the first one.

    Returns:
        z0, with the shape and dtype of `noise`.

    Raises:
        UserError: in the backward pass with `debug`: a recomputed prediction is not bit-identical.
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

    # Only the denoiser is recomputed. The scheduler's input scaling and step counter stay outside,
    # so a recomputed step gets exactly the input of the first pass.
    # The pipeline's `__call__` is decorated with `no_grad`; `__wrapped__` is the loop without it.
    loop = type(pipe).__call__.__wrapped__
    with quiet(pipe), replaced_forward(denoiser, step if checkpoint else forward):
        return loop(pipe, **call_arguments(pipe, embeds, noise, call))[0].to(noise.dtype)


@dataclass(frozen=True)
class DenseStep:
    """One recorded call of the dense denoiser in its own denoising loop.

    Attributes:
        args: its positional arguments.
        kwargs: its keyword arguments.
        prediction: the first tensor of its output, (n, ...).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prediction: Tensor

    def again(self, denoiser: nn.Module) -> Tensor:
        """The prediction of a denoiser (such as a gated one) on the same input, (n, ...).

        Checkpointed: its activations are recomputed in the backward pass.
        """
        return prediction_of(recompute(denoiser, *self.args, **self.kwargs))


@torch.no_grad()
def dense_steps(
    pipe: DiffusionPipeline,
    embeds: dict[str, Tensor],
    noise: Tensor,
    call: Call,
    leader: nn.Module | None = None,
    z0: Tensor | None = None,
) -> list[DenseStep]:
    """Record all calls of the denoiser from noise to z0, in order, without gradients.

    These are the inputs and targets of a per-step loss (EcoDiff, ablation "per-step loss"), of
    compensation in groups and of retraining.

    Args:
        pipe, embeds, noise, call: see `rollout`.
        leader: a pruned denoiser whose predictions lead from one latent to the next: the inputs are
            those that it meets, the predictions still those of the pipeline's denoiser. None: the
            pipeline's denoiser leads.
        z0: latents (n, ...) of pictures; the denoiser reads them, noised with `noise` as far as
            each step expects, instead of the loop's latents.

    Raises:
        UserError: with `z0`: the denoiser's latents are no tensor of their shape, or the scheduler
            can't noise.
    """
    forward, runs = denoiser_of(pipe).forward, runs_per_step(pipe, embeds)
    steps: list[DenseStep] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        if z0 is not None:
            timestep = pipe.scheduler.timesteps[len(steps) // runs].repeat(len(z0)).cpu()
            noised = objective(pipe.scheduler).noised(z0, noise, timestep)
            args, kwargs = _with_latents(forward, args, kwargs, noised)
        output = forward(*args, **kwargs)
        steps.append(DenseStep(args, kwargs, prediction_of(output)))
        return output if leader is None else leader(*args, **kwargs)

    with quiet(pipe), replaced_forward(denoiser_of(pipe), record):
        pipe(**call_arguments(pipe, embeds, noise, call))
    return steps


def _with_latents(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], latents: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A denoiser's arguments with other latents, which are its first one; both branches of guidance
    that pass together get them."""
    name = next(iter(inspect.signature(forward).parameters))
    old = args[0] if args else kwargs[name]
    if not isinstance(old, Tensor) or old.shape[1:] != latents.shape[1:]:
        raise UserError("retrain: states: pictures: this denoiser does not read latents alone")
    new = latents.repeat(len(old) // len(latents), *[1] * (old.ndim - 1)).to(old)
    return ((new, *args[1:]), kwargs) if args else ((), {**kwargs, name: new})


def _repeatable(forward: Callable[..., Any], number: int) -> Callable[..., Any]:
    """Wrap a forward to raise `UserError` when a later call differs from the first by one bit."""
    first: list[Tensor] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        prediction = prediction_of(output).detach()
        if first and not torch.equal(first[0], prediction):
            difference = (first[0] - prediction).abs().max().item()
            raise UserError(
                f"mask.debug: step {number}, computed again, differs by up to {difference:.3g};"
                " something in the model is random or keeps a state"
            )
        first.append(prediction)
        return output

    return call


def prediction_of(output: Any) -> Tensor:
    """The first tensor of a denoiser's output; a list of latents (Z-Image) is stacked."""
    first = output[0]
    return torch.stack(first) if isinstance(first, list) else first


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Set `requires_grad` of all parameters to False in the context and restore it afterwards.

    The context must include the backward pass: `checkpoint` expects a recomputed step to save the
    same tensors as the first pass.
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
    """Replace the module's `forward` in the context and restore it afterwards."""
    own = module.__dict__.get("forward")  # accelerate, for one, sets it on the instance
    module.forward = forward
    try:
        with without_compiling():
            yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
