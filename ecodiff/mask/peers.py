"""Scores of published pruning methods that use calibration data.

None of them iterates, and none looks at the final latents. Where an implementation differs from
the publication, its docstring and docs/methods.md say so.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional

from ecodiff.calibrate import Calibration
from ecodiff.calibrate.grams import Grams
from ecodiff.mask.scores import sum_over_lines, sum_over_unit
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.models.units import Port, Structure
from ecodiff.trajectory.denoising_loss import conditioned, objective

# Diff-Pruning stops where a timestep's loss falls below this share of the largest.
THRESHOLD = 0.05
TIMESTEPS = 50  # of the training timesteps; Diff-Pruning takes all thousand
DAMP = 0.01  # added to the Hessian's diagonal, relative to its mean, as OBS-Diff does
HIGHEST, LOWEST = 1.2, 0.8  # OBS-Diff's weights of the first and of the last step


@torch.no_grad()
def wanda(denoiser: nn.Module, structures: Sequence[Structure], grams: Grams) -> dict[str, Tensor]:
    """Wanda's metric: sum of |W_ij| * ||X_j|| over the columns j of a unit in its consumers (Sun et
    al. 2024, "A Simple and Effective Pruning Approach for Large Language Models").

    The paper scores single weights; summing over columns is how structured methods use it.

    Args:
        denoiser: the dense denoiser.
        structures: its structures.
        grams: Gram matrices of the consumers' inputs X over all steps; their diagonals hold the
            ||X_j||^2.

    Returns:
        Structure name -> fp32 (units,), on the CPU; infinite for modulation, which has no consumer.
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
    """Optimal brain surgeon saliency: the squared error of a consumer's output when a unit is
    removed and the other columns are re-solved (OBS-Diff, Zhu et al. 2025, "structured pruning").

        saliency = tr(W_B [H^-1]_BB^-1 W_B^T),   B = the columns of the unit,  H = X X^T

    H is damped by 1 % of its mean diagonal. Neurons are scored at once. Heads go one by one: the
    head of least saliency is removed, the others' columns are re-solved, and those are scored
    again. Saliencies of several consumers are added, where OBS-Diff merges their rankings. Its
    weight update is the least-squares compensation of the stage `prune`.

    Args:
        denoiser: the dense denoiser.
        structures: its structures.
        grams: Gram matrices H of the consumers' inputs, gathered with `decreasing_weight` per step
            for OBS-Diff's "timestep-aware Hessian construction".

    Returns:
        Structure name -> fp32 (units,), on the CPU: saliencies of neurons, and of heads the place
        at which they go, from 0; infinite for modulation, which has no consumer.
    """
    inverses: dict[str, Tensor] = {}
    found = {}
    for s in structures:
        inverses = {  # of this structure alone: each is as large as the moments that it is of
            name: inverses[name] if name in inverses else _damped_inverse(grams.gram[name])
            for name in dict.fromkeys(port.module for port in s.consumers)
        }
        layers = [_Layer.of(s, port, denoiser, inverses[port.module]) for port in s.consumers]
        if s.width == 1:
            found[s.name] = sum((one.saliencies() for one in layers), torch.zeros(s.units))
        else:
            found[s.name] = _places_of_removal(layers, s.units)
    return _only_consumed(structures, found)


def inner_blocks(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores that remove units of the first and the last block last; OBS-Diff leaves both whole.

    Args:
        scores: structure name -> (units,), in the order of the model's blocks.

    Returns:
        The same, infinite where a structure belongs to one of these two blocks. The middle block of
        a U-Net, which its modules list last, is not taken for the last.
    """
    blocks = [block for name in scores if (block := _block(name)) and "mid_block" not in block]
    ends = {*blocks[:1], *blocks[-1:]}
    return {
        name: torch.full_like(values, math.inf) if _block(name) in ends else values
        for name, values in scores.items()
    }


@dataclass
class _Layer:
    """A consumer of a structure, as heads are removed from it.

    Attributes:
        weight: (out, in), float64.
        inverse: H^-1 of its inputs, (in, in), float64.
        columns: of each unit, (units, columns of a unit).
    """

    weight: Tensor
    inverse: Tensor
    columns: Tensor

    @classmethod
    def of(cls, s: Structure, port: Port, denoiser: nn.Module, inverse: Tensor) -> _Layer:
        columns = s.columns(port, torch.arange(s.units)).view(-1, s.units, port.width)
        columns = columns.transpose(0, 1).flatten(1).to(inverse.device)
        return cls(_matrix(denoiser, port).to(inverse), inverse, columns)

    def saliencies(self) -> Tensor:
        """tr(W_B [H^-1]_BB^-1 W_B^T) of each unit's columns B, fp32 (units,), on the CPU."""
        own = self.columns
        blocks = torch.linalg.inv(self.inverse[own[:, :, None], own[:, None, :]])
        weights = self.weight[:, own].transpose(0, 1)  # (units, out, columns)
        return ((weights @ blocks) * weights).sum((1, 2)).float().cpu()

    def without(self, unit: int) -> _Layer:
        """The layer without a unit, its other columns solved again; the unit's become 0."""
        own = self.columns[unit]
        update = torch.linalg.solve(self.inverse[own][:, own], self.inverse[own])
        weight = self.weight - self.weight[:, own] @ update
        inverse = self.inverse - self.inverse[:, own] @ update
        inverse[own, own] = 1.0  # its columns of the weight are 0, so it has no saliency left
        return _Layer(weight, inverse, self.columns)


def _places_of_removal(layers: Sequence[_Layer], units: int) -> Tensor:
    """The place at which each unit goes, from 0, when the least salient goes first: (units,)."""
    places, here = torch.zeros(units), list(range(units))
    for place in range(units):
        total = sum((one.saliencies() for one in layers), torch.zeros(units))
        unit = min(here, key=lambda one: total[one].item())
        here.remove(unit)
        places[unit] = place
        layers = [one.without(unit) for one in layers]
    return places


def decreasing_weight(step: int, steps: int) -> float:
    """Weight of a denoising step in the Hessian, falling from 1.2 to 0.8 with log(steps - step).

    Errors of early steps are carried through all later ones (OBS-Diff, "timestep-aware Hessian
    construction").

    Args:
        step: index from 0.
        steps: number of steps.
    """
    share = math.log(steps - step) / math.log(steps) if steps > 1 else 1.0
    return LOWEST + (HIGHEST - LOWEST) * share


def taylor(
    pipe: DiffusionPipeline, calibration: Calibration, batch: int, seed: int = 0
) -> dict[str, Tensor]:
    """First-order Taylor importance: sum of |weight * gradient| over a unit's weights
    (Diff-Pruning; Fang et al. 2023, "Structural Pruning for Diffusion Models").

    The gradient is that of the model's own training loss on noised final latents of the dense
    model. It is summed over 50 timesteps from little noise to much, up to the first whose loss is
    below 5 % of the largest so far.

    Args:
        pipe: the dense pipeline.
        calibration: what `calibrate` recorded of it.
        batch: prompts that pass through the denoiser together.
        seed: of the noise, one draw per prompt for all timesteps.

    Returns:
        Structure name -> fp32 (units,), on the CPU.

    Raises:
        UserError: the calibration is of another model, or the scheduler's training loss is not
            known.
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
            # Weights whose output nothing reads (text stream of a joint transformer's last block)
            # have no gradient; it is set to zero.
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
    """Depth pruning: all units of a block get one score, the relative change of its hidden states,
    ||output - input||^2 / ||input||^2, averaged over all steps and prompts.

    Blocks that change their input least are removed first, as FLUX.1 Lite chose them; BK-SDM
    removes blocks that were chosen by hand. The last block may lose only a part of its units, so
    that the sparsity equals that of the other methods.

    Args:
        pipe: the dense pipeline.
        calibration: what `calibrate` recorded of it.
        batch: prompts that run together.

    Returns:
        Structure name -> fp32 (units,), on the CPU; infinite for structures outside of blocks.

    Raises:
        UserError: the calibration is of another model.
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
    """The numbered block that a structure belongs to, such as `transformer_blocks.3`; else ""."""
    found = re.match(r"(.*\.\d+)(?=\.)", name)
    return found[1] if found else ""


def _matrix(denoiser: nn.Module, port: Port) -> Tensor:
    """The weight of a linear, or of a 1x1 convolution, as (out, in)."""
    return denoiser.get_submodule(port.module).weight.detach().flatten(1)


def _damped_inverse(gram: Tensor) -> Tensor:
    """The inverse of a Gram matrix plus 1 % of its mean diagonal, float64.

    Damping makes it invertible where activations do not span all directions.
    """
    hessian = gram.double()
    hessian = hessian + DAMP * hessian.diagonal().mean() * torch.eye(len(hessian)).to(hessian)
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))


def _only_consumed(structures: Sequence[Structure], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add infinite scores for structures without consumers: their units are removed last."""
    kept = {s.name: torch.full((s.units,), math.inf) for s in structures if not s.consumers}
    return {**found, **kept}
