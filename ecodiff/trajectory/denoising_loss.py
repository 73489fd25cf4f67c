"""The model's own training loss: what to add noise to, at which timesteps, and what to predict.

`objective` reads it off the pipeline's scheduler; `conditioned` lets the pipeline itself prepare
the denoiser's other arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor, nn

from ecodiff.models.families import unguided
from ecodiff.models.pipelines import call_arguments, quiet
from ecodiff.models.structures import denoiser_of
from ecodiff.runtime.errors import UserError


class Diffusion:
    """Training with a beta schedule (DDPM) and noise, v or sample prediction.

    Latents are noised by a `DDPMScheduler` with the config of the pipeline's scheduler. They have
    unit variance at all timesteps, like the denoiser's inputs in sampling after the scheduler's
    `scale_model_input`.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = DDPMScheduler.from_config(scheduler.config)
        self.prediction = self.scheduler.config.prediction_type

    def spread(self, count: int) -> Tensor:
        """Evenly spaced training timesteps, from the least noise to the most: int64 (count,)."""
        return torch.linspace(0, len(self.scheduler) - 1, count).round().long()

    def noised(self, z0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noised latents at `timesteps` (n,), shaped as z0 and noise (n, ...)."""
        return self.scheduler.add_noise(z0, noise, timesteps.round().long())

    def target(self, z0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The prediction that is wanted at `timesteps` (n,): noise, v or z0; shaped as z0."""
        if self.prediction == "v_prediction":
            return self.scheduler.get_velocity(z0, noise, timesteps)
        return {"epsilon": noise, "sample": z0}[self.prediction]


class Flow:
    """Flow matching: noised latents (1 - sigma) z0 + sigma noise, target velocity noise - z0."""

    def __init__(self, scheduler: Any) -> None:
        self.steps = scheduler.config.num_train_timesteps
        self.timesteps = scheduler.timesteps.cpu()

    def spread(self, count: int) -> Tensor:
        """Evenly chosen timesteps of the schedule, from the least noise to the most: float32
        (count,)."""
        places = torch.linspace(0, len(self.timesteps) - 1, count).round().long()
        return self.timesteps.flip(0)[places]

    def noised(self, z0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noised latents at `timesteps` (n,), shaped as z0 and noise (n, ...)."""
        sigma = (timesteps / self.steps).to(z0).view(-1, *[1] * (z0.ndim - 1))
        return torch.lerp(z0, noise, sigma)

    def target(self, z0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity noise - z0, shaped as z0; the same at all timesteps."""
        return noise - z0


def objective(scheduler: Any) -> Diffusion | Flow:
    """The training objective that belongs to a pipeline's scheduler.

    Args:
        scheduler: the pipeline's scheduler; with flow matching its timesteps must be set.

    Raises:
        UserError: neither flow matching nor a beta schedule with epsilon, v_prediction or sample
            (EDM's schedulers, for example).
    """
    config = scheduler.config
    if type(scheduler).__name__.startswith("FlowMatch"):
        return Flow(scheduler)
    if config.get("prediction_type") in ("epsilon", "v_prediction", "sample") and (
        "beta_schedule" in config
    ):
        return Diffusion(scheduler)
    raise UserError(
        f"scheduler: {type(scheduler).__name__} with prediction_type"
        f" {config.get('prediction_type')} can't be trained; flow matching and schedulers with"
        " betas and epsilon, v_prediction or sample can"
    )


@dataclass
class Conditioned:
    """The denoiser's arguments for n prompts, as the pipeline itself prepares them.

    Attributes:
        arguments: all arguments of the denoiser's `forward` by name.
        latents: which of them are the noised latents.
        scale: the denoiser's timestep divided by the scheduler's (FLUX: 1 / 1000).
    """

    arguments: dict[str, Any]
    latents: str
    scale: float

    def predict(self, denoiser: nn.Module, noised: Tensor, timesteps: Tensor) -> Tensor:
        """The prediction of a denoiser, shaped as the noised latents (n, ...).

        Args:
            denoiser: the dense or the pruned one.
            noised: noised latents (n, ...), cast to the denoiser's dtype.
            timesteps: the scheduler's timesteps (n,).
        """
        inputs = _cast({**self.arguments, self.latents: noised}, denoiser.dtype)
        inputs["timestep"] = timesteps.to(noised.device) * self.scale
        predicted = denoiser(**inputs)[0]
        # PixArt predicts noise and variance in twice the channels; its sampler ignores the latter.
        return predicted.chunk(predicted.shape[1] // noised.shape[1], dim=1)[0]


class _Seen(Exception):
    """Leaves the pipeline's loop once the denoiser's arguments are recorded."""


def conditioned(
    pipe: DiffusionPipeline, embeds: Mapping[str, Tensor], noise: Tensor, call: Mapping[str, Any]
) -> Conditioned:
    """Record the arguments that the pipeline calls its denoiser with, without running it.

    Classifier-free guidance is off, as in training; a guidance scale that the denoiser takes as an
    input (FLUX dev) stays. The pipeline's scheduler is left with its timesteps set: all training
    timesteps with flow matching, those of `call` otherwise.

    Args:
        pipe: the pipeline.
        embeds: embeddings of n prompts, see `pipelines.encode`.
        noise: latents (n, ...); only their shape matters.
        call: the model's `call` settings.

    Raises:
        UserError: the denoiser has no argument `timestep` (Z-Image).
    """
    if any(key.startswith("negative_") for key in embeds):
        embeds = {k: v for k, v in embeds.items() if not k.startswith("negative_")}
        call = unguided(pipe, dict(call))
    if type(pipe.scheduler).__name__.startswith("FlowMatch"):
        call = {**call, "num_inference_steps": pipe.scheduler.config.num_train_timesteps}
    denoiser, seen = denoiser_of(pipe), {}
    signature = inspect.signature(denoiser.forward)

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(signature.bind(*args, **kwargs).arguments)
        raise _Seen

    hook = denoiser.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with quiet(pipe), torch.no_grad():
            pipe(**call_arguments(pipe, embeds, noise, dict(call)))
    except _Seen:
        pass
    finally:
        hook.remove()
    if "timestep" not in seen:
        raise UserError(f"{type(pipe).__name__}: can't be trained; its denoiser takes lists")
    scale = float(seen["timestep"].flatten()[0]) / float(pipe.scheduler.timesteps[0])
    return Conditioned(seen, next(iter(signature.parameters)), scale)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast floating-point tensors to `dtype`, also inside mappings."""
    if isinstance(value, Mapping):
        return {key: _cast(item, dtype) for key, item in value.items()}
    is_floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_floating else value
