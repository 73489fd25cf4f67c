"""What each unit is worth alone, to second order: where learning starts, and a method of its own.

The distortion is zero where nothing is removed, and so is its slope, so that what matters is its
curvature: for a squared distance the Gauss-Newton matrix J^T J, with J what each gate does to z0.
Its diagonal is found by one backward pass a prompt, whatever the number of units and steps.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ecodiff.calibrate import Calibration
from ecodiff.config.sections import MaskSettings
from ecodiff.models.structures import Structure, denoiser_of, discover
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.workers import Workers
from ecodiff.trajectory.gates import Gates
from ecodiff.trajectory.rollout import frozen, rollout

FURTHEST = 8.0  # a logit this far from zero is open, or closed, in any case

log = logging.getLogger(__name__)


def sensitivity(
    pipe: DiffusionPipeline,
    calibration: Calibration,
    *,
    batch: int,
    checkpoint: bool = True,
    seed: int = 0,
    keep_steps: int = 0,
    means: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """The relative latent error (EcoDiff, objective) that each unit's removal alone would cause.

    To second order, and of gates, whose removal changes them by one: the mean over prompts of
    |dz0 / dgate|^2 / (size of z0 * variance of z0), end to end through all steps. The norm is
    Hutchinson's estimate, from one random vector of signs a prompt.

    Args:
        pipe: the dense pipeline.
        calibration: what `calibrate` recorded of it.
        batch: prompts that pass together; of several processes, each takes its share of all.
        checkpoint, keep_steps: see `rollout`.
        seed: of the signs.
        means: what closed gates let through, see `Gates`.

    Returns:
        Structure name -> fp32 (units,), on the CPU.

    Raises:
        UserError: the calibration is of another model, or a gradient is not finite.
    """
    calibration = calibration.for_dense(pipe)
    denoiser = denoiser_of(pipe)
    workers = Workers(denoiser.device)
    gates = Gates(discover(denoiser), means=means).to(denoiser.device)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, calibration.z0.shape, generator=generator) * 2.0 - 1
    sums = {name: torch.zeros_like(logits) for name, logits in gates.logits.items()}
    own = range(len(signs))[workers.own(len(signs))]
    for rows in (own[start : start + batch] for start in range(0, len(own), batch)):
        embeds, noise, _ = calibration.batch(rows, denoiser.device)
        leaves = gates.open(len(rows))
        with frozen(denoiser), gates.attached(denoiser):
            z0 = rollout(
                pipe,
                embeds,
                noise,
                calibration.call,
                checkpoint=checkpoint,
                keep_steps=keep_steps,
            )
            (z0.float() * signs[rows].to(z0.device)).sum().backward()
        # The last block of a joint transformer has outputs that nothing reads.
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        for name, gradient in gradients.items():
            if not gradient.isfinite().all():
                prompts = [calibration.prompts[i] for i in rows]
                raise UserError(f"mask: gradients are not finite on prompts {prompts}")
            sums[name] += gradient.square().sum(0)
        log.info("mask: sensitivity, prompts %s to %s of %s", rows[0] + 1, rows[-1] + 1, len(signs))
    workers.average(sums.values())
    scale = len(own) * signs[0].numel() * calibration.z0.float().var().item()
    return {name: value.detach().cpu() / scale for name, value in sums.items()}


def closed_means(settings: MaskSettings, calibration: Calibration) -> Mapping[str, Tensor]:
    """What closed gates let through by the settings: module -> its means; none for zeros."""
    return calibration.means if settings.closed == "mean" else {}


def costs_of_share(
    structures: Sequence[Structure], found: Mapping[str, Tensor], total: int
) -> dict[str, Tensor]:
    """What a unit's removal costs for what it frees: its sensitivity over its share of `total`.

    Latent error for one whole model's worth of parameters; structure name -> fp32 (units,).
    """
    return {s.name: found[s.name] * (total / s.unit_parameters) for s in structures}


def first_logits(costs: Tensor, price: float) -> Tensor:
    """log(cost / price): negative for units that cost less than their parameters are worth.

    So gates are uncertain where the choice is, and certain far from it. Shaped as `costs`.
    """
    return (costs / max(price, torch.finfo(torch.float32).tiny)).log().clamp(-FURTHEST, FURTHEST)
