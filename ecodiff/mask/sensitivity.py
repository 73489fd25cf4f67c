"""The importance of one unit by itself: the diagonal of the Gauss-Newton matrix of the distortion.

At the dense model (all gates 1) the distortion |z0' - z0|^2 is zero and so is its gradient in the
gates. Its second-order term is the Gauss-Newton matrix J^T J, with J = dz0 / dgates. A diagonal
element |dz0 / dgate|^2 estimates the distortion that removing this unit alone would cause.

One backward pass per prompt estimates the whole diagonal (Hutchinson): for random signs v with
E[v v^T] = I, E[(J^T v)_i^2] = (J^T J)_ii. Learning starts from it by default, and it is a method of
its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ecodiff.calibrate import Calibration
from ecodiff.config.sections import MaskSettings
from ecodiff.models.structures import Modulation, denoiser_of, discover
from ecodiff.models.units import Structure
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.workers import Workers
from ecodiff.trajectory.directions import bases_of
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
    modulation: Modulation = "channels",
) -> dict[str, Tensor]:
    """Estimate the distortion, mean((z0' - z0)^2) / var(z0), that removing each unit alone causes.

    To second order in the gates, through all denoising steps: a weighted mean over prompts of
    |dz0 / dgate|^2 / (elements of z0 * var(z0)). The squared norm is a Hutchinson estimate with one
    random sign vector per prompt. A prompt weighs 1 / root(its sum over all units): a few prompts,
    whose picture turns into another at the slightest change, have sums thousands of times those of
    the others and would decide a plain mean alone.

    Args:
        pipe: the dense pipeline.
        calibration: what `calibrate` recorded of it.
        batch: prompts that pass through the denoiser together. Several processes divide the prompts
            among them.
        checkpoint: recompute steps in the backward pass, see `rollout`.
        seed: of the sign vectors.
        keep_steps: last steps that are not recomputed, see `rollout`.
        means: constants that closed gates give, see `Gates`.
        modulation: its units, see `discover`.

    Returns:
        Structure name -> fp32 (units,), on the CPU.

    Raises:
        UserError: the calibration is of another model, or a gradient is not finite.
    """
    sums: dict[str, Tensor] = {}
    weights = torch.zeros(1, device=denoiser_of(pipe).device)
    how = {"batch": batch, "checkpoint": checkpoint, "seed": seed, "keep_steps": keep_steps}
    how |= {"means": means, "modulation": modulation}
    for squares in squared_gradients(pipe, calibration, **how):
        weight = robust_weights(squares)
        weights += weight.sum()
        for name, values in squares.items():
            sums[name] = sums.get(name, 0) + weight @ values
    Workers(weights.device).average([*sums.values(), weights])
    scale = weights.item() * calibration.z0[0].numel() * calibration.z0.float().var().item()
    return {name: value.cpu() / scale for name, value in sums.items()}


def robust_weights(squares: Mapping[str, Tensor]) -> Tensor:
    """What each prompt weighs: 1 / root(its sum over all units), 0 where the sum is 0; (n,)."""
    totals = torch.stack([values.sum(1) for values in squares.values()]).sum(0)
    return torch.where(totals > 0, totals.rsqrt(), 0)


def squared_gradients(
    pipe: DiffusionPipeline,
    calibration: Calibration,
    *,
    batch: int,
    checkpoint: bool = True,
    seed: int = 0,
    keep_steps: int = 0,
    means: Mapping[str, Tensor] = MappingProxyType({}),
    modulation: Modulation = "channels",
) -> Iterator[dict[str, Tensor]]:
    """One Hutchinson estimate a prompt of |dz0 / dgate|^2 at the dense model, a batch at a time.

    Arguments and errors are those of `sensitivity`. With several processes, each gets its own
    prompts.

    Yields:
        Structure name -> fp32 (n, units) for the n prompts of a batch, on the model's device.
    """
    calibration = calibration.for_dense(pipe)
    denoiser = denoiser_of(pipe)
    structures = discover(denoiser, modulation)
    bases = bases_of(denoiser, structures, calibration.moments)
    gates = Gates(structures, means=means, bases=bases).to(denoiser.device)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, calibration.z0.shape, generator=generator) * 2.0 - 1
    own = range(len(signs))[Workers(denoiser.device).own(len(signs))]
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
        # Units whose output nothing reads (text stream of a joint transformer's last block) have
        # no gradient and a sensitivity of 0.
        found = {
            name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.square()
            for name, leaf in leaves.items()
        }
        if not all(squares.isfinite().all() for squares in found.values()):
            prompts = [calibration.prompts[i] for i in rows]
            raise UserError(f"mask: gradients are not finite on prompts {prompts}")
        log.info("mask: sensitivity, prompts %s to %s of %s", rows[0] + 1, rows[-1] + 1, len(signs))
        yield found


def closed_means(settings: MaskSettings, calibration: Calibration) -> Mapping[str, Tensor]:
    """The constants that closed gates give, for `Gates`: the calibration means, or none (0)."""
    return calibration.means if settings.closed == "mean" else {}


def costs_of_share(
    structures: Sequence[Structure], found: Mapping[str, Tensor], total: int
) -> dict[str, Tensor]:
    """Sensitivity per parameter: each unit's sensitivity divided by its share of the parameters.

    The first directions of a linear's input that go have one cost, all of theirs over what goes
    with them together: as many as make it lowest, for nothing is gained before enough are gone.

    Args:
        structures: all structures of the denoiser.
        found: their sensitivities, structure name -> (units,).
        total: parameters of the denoiser.

    Returns:
        Structure name -> fp32 (units,): the relative latent error, scaled to the removal of as many
        parameters as the denoiser has.
    """
    return {s.name: _costs(s, found[s.name]) * total for s in structures}


def _costs(structure: Structure, found: Tensor) -> Tensor:
    """Cost a parameter: (units,)."""
    if not structure.unit_parameters:  # nothing is won by removing it
        return torch.full_like(found, torch.inf)
    costs = found / structure.unit_parameters
    if not structure.overhead:
        return costs
    values, order = found.double().sort()
    gone = structure.sizes().cumsum(0)
    together = torch.where(gone > 0, values.cumsum(0) / gone.clamp(min=1), torch.inf)
    first = int(together.argmin()) + 1
    return costs.index_fill(0, order[:first], together[first - 1].item())


def first_logits(costs: Tensor, price: float) -> Tensor:
    """Initial logits log(cost / price), clamped to [-8, 8]; shaped as `costs`.

    Negative (likely closed) for units that cost less than the objective pays for their parameters.
    Gates near the price are uncertain, so learning decides them; gates far from it start open or
    closed.

    Args:
        costs: sensitivity per share of the parameters, (units,).
        price: the cost below which the objective removes units.
    """
    return (costs / max(price, torch.finfo(torch.float32).tiny)).log().clamp(-FURTHEST, FURTHEST)
