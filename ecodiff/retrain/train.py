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
from ecodiff.models.pipelines import check_dense
from ecodiff.models.saving import dense_structures
from ecodiff.models.structures import denoiser_of
from ecodiff.runtime.errors import UserError
from ecodiff.trajectory.denoising_loss import conditioned, objective


def retrain(
    pipe: DiffusionPipeline,
    calibration: Calibration,
    settings: RetrainSettings,
    teacher: DiffusionPipeline | None = None,
) -> pd.DataFrame:
    """Train the denoiser in place on the model's own training loss (EcoDiff, "retraining").

        loss = mse(prediction, target) + distillation * mse(prediction, dense prediction)

    on noised final latents of the dense model; prediction and target are noise, v or flow, as the
    scheduler says.

    Args:
        pipe: the pruned pipeline; its denoiser keeps class, shapes, dtype and device.
        calibration: embeddings and z0 of the dense model that it was pruned from.
        settings: the section `retrain.lora` or `retrain.full`.
        teacher: that dense model, on the same device; needed for distillation.

    Returns:
        One row per step: step, loss, distillation (without its weight), seconds since the start.

    Raises:
        UserError: distillation without a teacher, a calibration or teacher of another model, a
            batch larger than the calibration, a rank above the layers' widths, a scheduler that
            isn't supported, or a loss that is not finite; with LoRA the denoiser is then as it was.
    """
    if settings.distillation and teacher is None:
        raise UserError("retrain: distillation needs the dense model")
    if teacher is not None:
        check_dense(pipe, teacher)
    calibration, count = calibration.for_pruned(pipe), len(calibration.prompts)
    if settings.batch > count:
        raise UserError(f"retrain: batch: {settings.batch}, but {calibration.file} has {count}")
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


def _losses(
    pipe: DiffusionPipeline,
    calibration: Calibration,
    settings: RetrainSettings,
    teacher: DiffusionPipeline | None,
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
        wanted = prepared.predict(denoiser_of(teacher), noised, timesteps).float()
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
    widest = max((min(present[t].weight.shape[:2]) for t in targets), default=0)
    if settings.rank > widest:
        raise UserError(f"retrain: rank: {settings.rank} is above the widest layer's {widest}")
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
