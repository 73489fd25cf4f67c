"""What mask learning minimises: distance to the dense model's z0, and a pull towards sparsity.

A pull is a fixed price of a parameter (`Penalty`) or a target with multipliers (`Budget`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ecodiff.models.structures import Structure
from ecodiff.trajectory.gates import STRETCH, TEMPERATURE, Gates


def distortion(z0: Tensor, dense: Tensor, variance: Tensor | float) -> Tensor:
    """mean((z0' - z0)^2) / var(z0), an fp32 scalar (EcoDiff, "end-to-end objective").

    Args:
        z0: final latents of the gated model, any float dtype.
        dense: those of the dense model, same shape.
        variance: of z0 over the whole calibration set, so that batches weigh the same.
    """
    return (z0.float() - dense.float()).square().mean() / variance


def expected_sparsity(gates: Gates, total_parameters: int) -> dict[str, Tensor]:
    """What gates expect to remove of each kind; a noise floor can't switch off its gradient.

    With a floor, gates far from zero are open (or closed) for certain: the exact probability is
    flat there, and where learning starts it is flat for all, so no objective could ever begin.
    The value stays exact; the gradient is that of the probability before it is clipped.

    Returns kind -> share of `total_parameters`, fp32 scalars; their sum is the expected sparsity.
    """
    exact = gates.expected_sparsity(total_parameters)
    if gates.floor == 0:
        return exact
    low, high = STRETCH
    threshold = TEMPERATURE * math.log(-low / high)
    slopes = gates.shares(
        lambda logits: (1 + 2 * gates.floor) * torch.sigmoid(threshold - logits), total_parameters
    )
    return {kind: exact[kind].detach() + s - s.detach() for kind, s in slopes.items()}


class Objective(Protocol):
    """The pull towards sparsity, beside the distortion."""

    def prices(
        self, structures: Sequence[Structure], costs: Mapping[str, Tensor], total: int
    ) -> Mapping[str, float]:
        """Kind -> the cost below which a unit should go; costs as `costs_of_share` gives them."""

    def target(self, progress: float) -> float:
        """The sparsity asked for at `progress` in 0..1 of the iterations; NaN if none is."""

    def regulariser(self, removed: Mapping[str, Tensor], progress: float) -> Tensor:
        """The term that is added to the distortion, from each kind's expected share; scalar."""

    def ascend(self, sparsity: float, progress: float) -> None:
        """Update whatever the objective itself learns."""


@dataclass
class Penalty:
    """beta * the expected share of all parameters that maskable units keep (EcoDiff, "penalty").

    Attributes:
        beta: weight of the whole.
        maskable: kind -> share of all parameters that could go.
        weights: kind -> what its parameters weigh.
    """

    beta: float
    maskable: Mapping[str, float]
    weights: Mapping[str, float]

    def prices(
        self, structures: Sequence[Structure], costs: Mapping[str, Tensor], total: int
    ) -> Mapping[str, float]:
        """What the penalty itself pays for a share of the parameters."""
        return {kind: self.beta * weight for kind, weight in self.weights.items()}

    def target(self, progress: float) -> float:
        """No sparsity is asked for."""
        return math.nan

    def regulariser(self, removed: Mapping[str, Tensor], progress: float) -> Tensor:
        """beta * sum of w * P(gate > 0), w a unit's share of the parameters times its weight."""
        kept = [self.weights[k] * (self.maskable[k] - share) for k, share in removed.items()]
        return self.beta * torch.stack(kept).sum()

    def ascend(self, sparsity: float, progress: float) -> None:
        """Nothing is learned."""


@dataclass
class Budget:
    """l1 (s* - s) + l2 (s* - s)^2 with s* rising over the first iterations, l1 and l2 by ascent.

    l2 starts high: all logits start equal and would cross over together, far past the target, if
    only what l1 has summed up could pull them back.
    """

    sparsity: float
    warmup: float
    lr: float
    linear: float = 0.0
    quadratic: float = 30.0

    def prices(
        self, structures: Sequence[Structure], costs: Mapping[str, Tensor], total: int
    ) -> Mapping[str, float]:
        """What the first unit costs that stays when the cheapest go, up to the sparsity."""
        every = torch.cat([costs[s.name] for s in structures])
        sizes = torch.cat([torch.full((s.units,), float(s.unit_parameters)) for s in structures])
        order = every.argsort(stable=True)
        gone = int((sizes[order].cumsum(0) <= self.sparsity * total).sum())
        price = every[order[min(gone, len(order) - 1)]].item()
        return {s.kind: price for s in structures}

    def target(self, progress: float) -> float:
        """The target s*, which rises linearly over the share `warmup` of the iterations."""
        return self.sparsity * min(1.0, progress / self.warmup if self.warmup else 1.0)

    def regulariser(self, removed: Mapping[str, Tensor], progress: float) -> Tensor:
        """The Lagrangian terms; positive multipliers pull s up to s*."""
        gap = self.target(progress) - torch.stack([*removed.values()]).sum()
        return self.linear * gap + self.quadratic * gap.square()

    def ascend(self, sparsity: float, progress: float) -> None:
        """One step of gradient ascent on both multipliers."""
        gap = self.target(progress) - sparsity
        self.linear += self.lr * gap
        self.quadratic += self.lr * gap**2
