"""Scores of published methods that look at data: none of them learns, or sees the final picture."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional

from ecodiff.calibrate import Calibration, Grams
from ecodiff.mask.scores import sum_over_lines, sum_over_unit
from ecodiff.models.structures import Port, Structure, denoiser_of, discover
from ecodiff.trajectory.denoising_loss import conditioned, objective

# Diff-Pruning stops where a timestep's loss falls below this share of the largest.
THRESHOLD = 0.05
TIMESTEPS = 50  # of the training timesteps; Diff-Pruning takes all thousand
DAMP = 0.01  # added to the Hessian's diagonal, relative to its mean, as OBS-Diff does
HIGHEST, LOWEST = 1.2, 0.8  # OBS-Diff's weights of the first and of the last step


@torch.no_grad()
def wanda(denoiser: nn.Module, structures: Sequence[Structure], grams: Grams) -> dict[str, Tensor]:
    """Weight times activation: sum of |W_ij| ||X_j|| over a unit's consumer columns (Sun et al.
    2024, "A Simple and Effective Pruning Approach for LLMs", "Pruning
    Metric"; by columns, as its structured descendants).

    Modulation has no consumer and is kept: infinite. Structure name -> fp32 (units,), on the CPU.
    """
    found = {}
    for s in structures:
        found[s.name] = torch.zeros(s.units)
        for port in s.consumers:
            norms = grams.gram[port.module].diagonal().sqrt()
            weight = _matrix(denoiser, port).abs().to(norms)
            found[s.name] += sum_over_lines(s, port, weight.sum(0) * norms)
    return _only_consumed(structures, found)


@torch.no_grad()
def obs(denoiser: nn.Module, structures: Sequence[Structure], grams: Grams) -> dict[str, Tensor]:
    """What a unit's removal costs once all else is re-solved.

    The optimal brain surgeon's saliency, tr(W_B [H^-1]_BB^-1 W_B^T) for the columns B of a unit, as
    in OBS-Diff ("Timestep-aware Hessian construction", "structured pruning"): the Hessian is that
    of the inputs over all steps, weighted by `decreasing_weight` when `grams` are. Costs of several
    consumers add up, where OBS-Diff merges their rankings; all units are scored at once, where it
    scores the rest again after each head. Its weight update is what compensation solves.

    Modulation has no consumer and is kept: infinite. Structure name -> fp32 (units,), on the CPU.
    """
    found = {s.name: torch.zeros(s.units) for s in structures}
    inverses: dict[str, Tensor] = {}
    for s in structures:
        for port in s.consumers:
            if port.module not in inverses:
                inverses[port.module] = _damped_inverse(grams.gram[port.module])
            inverse = inverses[port.module]
            weight = _matrix(denoiser, port).to(inverse)
            columns = s.columns(port, torch.arange(s.units)).view(-1, s.units, s.width)
            for unit, own in enumerate(columns.transpose(0, 1).flatten(1).to(weight.device)):
                block = torch.linalg.inv(inverse[own][:, own])
                found[s.name][unit] += (weight[:, own] @ block * weight[:, own]).sum().cpu().float()
    return _only_consumed(structures, found)


def decreasing_weight(step: int, steps: int) -> float:
    """OBS-Diff's logarithmic weight of a denoising step ("timestep-aware Hessian construction"):
    errors of early steps are carried through all later ones."""
    share = math.log(steps - step) / math.log(steps) if steps > 1 else 1.0
    return LOWEST + (HIGHEST - LOWEST) * share


def taylor(
    pipe: DiffusionPipeline, calibration: Calibration, batch: int, seed: int = 0
) -> dict[str, Tensor]:
    """Sum of |weight x gradient| over a unit's weights (Diff-Pruning; Fang et al. 2023,
    "Structural Pruning for Diffusion Models").

    The gradient is that of the model's own training loss on the dense model's latents, summed over
    timesteps from little noise to much, as far as their loss exceeds a share of the largest.

    Returns structure name -> fp32 (units,), on the CPU. Raises `UserError` when the scheduler's
    training loss isn't known.
    """
    calibration = calibration.for_dense(pipe)
    denoiser, structures = denoiser_of(pipe), discover(pipe)
    modules = dict.fromkeys(p.module for s in structures for p in (*s.producers, *s.consumers))
    weights = {name: denoiser.get_submodule(name).weight for name in modules}
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    noise = torch.randn(calibration.z0.shape, generator=torch.Generator().manual_seed(seed))
    chunks = []
    batches = calibration.batches(batch, denoiser.device)
    for (embeds, start, z0), drawn in zip(batches, noise.split(batch), strict=True):
        prepared = conditioned(pipe, embeds, start, calibration.call)
        chunks.append((prepared, z0, drawn.to(z0)))
    loss_of, largest = objective(pipe.scheduler), 0.0
    for timestep in loss_of.spread(TIMESTEPS):
        total, gradients = 0.0, [0.0] * len(weights)
        for prepared, z0, drawn in chunks:
            times = timestep.repeat(len(z0)).to(z0.device)
            predicted = prepared.predict(denoiser, loss_of.noised(z0, drawn, times), times).float()
            loss = functional.mse_loss(predicted, loss_of.target(z0, drawn, times))
            loss = loss * (len(z0) / len(noise))
            # The last block of a joint transformer has outputs that nothing reads.
            found = torch.autograd.grad(loss, [*weights.values()], materialize_grads=True)
            gradients = [one + another for one, another in zip(gradients, found, strict=True)]
            total += loss.item()
        largest = max(largest, total)
        if total < THRESHOLD * largest:
            break
        for name, gradient in zip(weights, gradients, strict=True):
            sums[name] += gradient

    def products(module: str) -> Tensor:
        return (weights[module].detach().float() * sums[module]).abs()

    return {s.name: sum_over_unit(s, products) for s in structures}


@torch.no_grad()
def depth(pipe: DiffusionPipeline, calibration: Calibration, batch: int) -> dict[str, Tensor]:
    """Whole blocks go, first those that change their hidden states least: the mean squared
    difference of a block's input and output, relative to the input, over all steps (as FLUX.1 Lite
    chose the blocks to drop; BK-SDM drops blocks by hand).

    The last block that goes may go in part, so that the share of parameters is that of the other
    methods. What lies in no block is kept: infinite. Structure name -> fp32 (units,), on the CPU.
    """
    calibration = calibration.for_dense(pipe)
    denoiser, structures = denoiser_of(pipe), discover(pipe)
    blocks = {s.name: _block(s.name) for s in structures}
    changes: dict[str, list[float]] = {name: [] for name in blocks.values() if name}

    def watch(
        name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        bound = inspect.signature(block.forward).bind(*args, **kwargs).arguments
        before = next(one for one in bound.values() if isinstance(one, Tensor))
        outputs = output if isinstance(output, tuple) else (output,)
        after = [one for one in outputs if one is not None and one.shape == before.shape][-1]
        power = before.float().square().sum()
        changes[name].append(((after - before).float().square().sum() / power).item())

    handles = [
        denoiser.get_submodule(name).register_forward_hook(partial(watch, name), with_kwargs=True)
        for name in changes
    ]
    try:
        calibration.drawn_by(pipe, batch)
    finally:
        for handle in handles:
            handle.remove()
    means = {name: sum(found) / len(found) for name, found in changes.items()}
    return {s.name: torch.full((s.units,), means.get(blocks[s.name], math.inf)) for s in structures}


def _block(name: str) -> str:
    """The numbered block that a structure belongs to, such as `transformer_blocks.3`; or none."""
    found = re.match(r"(.*\.\d+)(?=\.)", name)
    return found[1] if found else ""


def _matrix(denoiser: nn.Module, port: Port) -> Tensor:
    """The weight of a linear, or of a 1x1 convolution, as (out, in)."""
    return denoiser.get_submodule(port.module).weight.detach().flatten(1)


def _damped_inverse(gram: Tensor) -> Tensor:
    """The inverse of a Gram matrix, float64; damping makes any one invertible."""
    hessian = gram.double()
    hessian = hessian + DAMP * hessian.diagonal().mean() * torch.eye(len(hessian)).to(hessian)
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))


def _only_consumed(structures: Sequence[Structure], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores that know consumers alone: units that have none stay for as long as possible."""
    kept = {s.name: torch.full((s.units,), math.inf) for s in structures if not s.consumers}
    return {**found, **kept}
