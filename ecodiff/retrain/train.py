"""Retrain a pruned denoiser on the dense model's latents, by LoRA or full fine-tuning."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, LoraModel
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

from ecodiff.calibrate import Calibration
from ecodiff.config.sections import RetrainSettings
from ecodiff.models.saving import dense_structures
from ecodiff.models.structures import denoiser_of
from ecodiff.runtime.errors import UserError, first_line
from ecodiff.trajectory.denoising_loss import conditioned, objective


def retrain(
    pipe: DiffusionPipeline,
    calibration: Calibration,
    settings: RetrainSettings,
    teacher: nn.Module | None = None,
) -> pd.DataFrame:
    """Train the denoiser in place on the model's own training loss (EcoDiff, "retraining").

        loss = mse(prediction, target) + distillation * mse(prediction, dense prediction)

    on noised final latents of the dense model; prediction and target are noise, v or flow, as the
    scheduler says.

    Args:
        pipe: the pruned pipeline; its denoiser keeps class, shapes, dtype and device.
        calibration: prompt embeddings and z0 of the dense model.
        settings: the section `retrain.lora` or `retrain.full`.
        teacher: the dense denoiser on the same device; needed if `settings.distillation` > 0.

    Returns:
        One row per step: step, loss, distillation (without its weight), seconds since the start.

    Raises:
        UserError: distillation without a teacher, a calibration or teacher of another model, a rank
            that no weight has, a scheduler that is not supported, or a loss that is not finite.
            With LoRA the denoiser is unchanged after an error.
    """
    if settings.distillation and teacher is None:
        raise UserError("retrain: distillation needs the dense model")
    _check_fit(pipe, calibration, settings, teacher)
    denoiser = denoiser_of(pipe)
    generator = torch.Generator().manual_seed(settings.seed)
    history, start = [], time.perf_counter()
    with _trainable(denoiser, settings) as parameters:
        # No weight decay: it would pull the dense model's weights towards zero.
        optimiser = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
        for step in track(range(settings.steps), description=f"retrain ({settings.kind})"):
            losses = _losses(pipe, calibration, settings, teacher, generator)
            total = losses[0] + settings.distillation * losses[1]
            if not total.isfinite():
                raise UserError(f"retrain: loss is not finite at step {step}; lower the key lr")
            optimiser.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            seconds = time.perf_counter() - start
            history.append((step, losses[0].item(), losses[1].item(), seconds))
    return pd.DataFrame(history, columns=["step", "loss", "distillation", "seconds"])


def _check_fit(
    pipe: DiffusionPipeline,
    calibration: Calibration,
    settings: RetrainSettings,
    teacher: nn.Module | None,
) -> None:
    """Insist that the model can be run on the record, which is that of its dense model."""
    try:
        with torch.no_grad():
            _losses(pipe, calibration.of([0]), settings, teacher, torch.Generator())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError) as error:
        reason = first_line(error)
        raise UserError(f"retrain: record or teacher is of another model ({reason})") from error


def _losses(
    pipe: DiffusionPipeline,
    calibration: Calibration,
    settings: RetrainSettings,
    teacher: nn.Module | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The training loss and the squared distance to the teacher on a random batch, scalars."""
    denoiser = denoiser_of(pipe)
    rows = torch.randperm(len(calibration.prompts), generator=generator)[: settings.batch]
    embeds, start, z0 = calibration.batch(rows, denoiser.device)
    prepared = conditioned(pipe, embeds, start, calibration.call)
    learned = objective(pipe.scheduler)
    timesteps = learned.draw(len(rows), generator).to(denoiser.device)
    noise = torch.randn(z0.shape, generator=generator).to(denoiser.device)
    z0 = z0.to(noise)
    noised = learned.noised(z0, noise, timesteps)
    predicted = prepared.predict(denoiser, noised, timesteps).float()
    loss = functional.mse_loss(predicted, learned.target(z0, noise, timesteps))
    if not settings.distillation:
        return loss, torch.zeros_like(loss)
    with torch.no_grad():
        wanted = prepared.predict(teacher, noised, timesteps).float()
    return loss, functional.mse_loss(predicted, wanted)


@contextmanager
def _trainable(denoiser: nn.Module, settings: RetrainSettings) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters to train; then restore `requires_grad` and drop gradients."""
    wanted = {name: p.requires_grad for name, p in denoiser.named_parameters()}
    kind = _lora if settings.kind == "lora" else _full
    try:
        with kind(denoiser, settings) as parameters:
            yield parameters
    finally:
        for name, parameter in denoiser.named_parameters():
            parameter.requires_grad_(wanted[name])
            parameter.grad = None


@contextmanager
def _lora(denoiser: nn.Module, settings: RetrainSettings) -> Iterator[list[nn.Parameter]]:
    """LoRA on attention and feed-forward linears: merged at the end, removed after an error."""
    targets = {
        port.module
        for structure in dense_structures(denoiser)
        if structure.kind != "modulation"
        for port in (*structure.producers, *structure.consumers)
    }
    present = dict(denoiser.named_modules())
    # An attention without heads has lost its linears, and others may be empty (0 rows or columns).
    targets = sorted(t for t in targets if t in present and present[t].weight.numel())
    largest = max((min(present[target].weight.shape) for target in targets), default=0)
    if settings.rank > largest:
        raise UserError(f"retrain: rank is {settings.rank}, but no weight has more than {largest}")
    config = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=targets)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        adapted = LoraModel(denoiser, config, "default")
    try:
        yield [p for p in denoiser.parameters() if p.requires_grad]
    except BaseException:
        adapted.unload()
        raise
    adapted.merge_and_unload()


@contextmanager
def _full(denoiser: nn.Module, settings: RetrainSettings) -> Iterator[list[nn.Parameter]]:
    """All weights, in float32: small updates would be lost to rounding in half precision."""
    dtype = denoiser.dtype
    if dtype != torch.float32:
        denoiser.to(torch.float32)
    denoiser.requires_grad_(True)
    try:
        yield [p for p in denoiser.parameters() if p.numel()]
    finally:
        if dtype != torch.float32:
            denoiser.to(dtype)
