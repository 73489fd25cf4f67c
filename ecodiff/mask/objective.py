"""What mask learning minimises (EcoDiff, "end-to-end objective").

    loss = mean((z0' - z0)^2) / var(z0)  +  regulariser

z0 is the final latent of the dense model, z0' that of the gated model from the same noise, prompt
and scheduler. The regulariser pulls the gates towards sparsity: `Penalty` with a fixed weight,

    beta * sum over units of w * P(gate > 0),   w = the unit's share of the denoiser's parameters,

`Budget` with Lagrange multipliers l1 and l2, towards a target s* of the expected sparsity s:

    l1 (s* - s) + l2 (s* - s)^2
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ecodiff.models.units import Structure
from ecodiff.trajectory.gates import STRETCH, TEMPERATURE, Gates


def distortion(z0: Tensor, dense: Tensor, variance: Tensor | float) -> Tensor:
    """mean((z0' - z0)^2) / var(z0), an fp32 scalar (EcoDiff, "end-to-end objective").

    Args:
        z0: z0', final latents of the gated model, (n, ...), any float dtype.
        dense: z0, those of the dense model, same shape.
        variance: var(z0) over the whole calibration set, the same for all batches.
    """
    return (z0.float() - dense.float()).square().mean() / variance


def expected_sparsity(gates: Gates, total_parameters: int) -> dict[str, Tensor]:
    """`Gates.expected_sparsity` with a gradient that does not vanish under a noise floor.

    With a floor d > 0, P(gate > 0) is exactly 0 or 1 for logits far from zero, so its gradient is 0
    there. With a first logit of 3 and a floor of 0.1 that holds for all units, and learning could
    not begin. The value returned is exact; the gradient is that of the probability before clipping
    (a straight-through estimate).

    Args:
        gates: the gates of all structures.
        total_parameters: of the dense denoiser.

    Returns:
        Kind -> expected share of `total_parameters` removed, fp32 scalar. Their sum is the expected
        sparsity.
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
    """The regulariser: the term of the loss that pulls the gates towards sparsity."""

    def prices(
        self, structures: Sequence[Structure], costs: Mapping[str, Tensor], total: int
    ) -> Mapping[str, float]:
        """Kind -> the cost below which a unit should be removed, for `sensitivity.first_logits`.

        Args:
            structures: all structures of the denoiser.
            costs: of all units, as `sensitivity.costs_of_share` returns them.
            total: parameters of the denoiser.
        """

    def target(self, progress: float) -> float:
        """The target sparsity at `progress`, the share of iterations done (0 to 1); NaN: none."""

    def regulariser(self, removed: Mapping[str, Tensor], progress: float) -> Tensor:
        """The term to add to the distortion, a scalar.

        Args:
            removed: kind -> expected share of the parameters removed, as `expected_sparsity`.
            progress: share of the iterations done, 0 to 1.
        """

    def ascend(self, sparsity: float, progress: float) -> None:
        """Update the objective's own multipliers from the expected sparsity of this iteration."""


@dataclass
class Penalty:
    """beta * sum of w * P(gate > 0): a fixed weight on the expected share of parameters kept
    (EcoDiff, "end-to-end objective").

    Attributes:
        beta: the weight.
        maskable: kind -> share of the denoiser's parameters that its units hold.
        weights: kind -> factor on the parameters of that kind.
    """

    beta: float
    maskable: Mapping[str, float]
    weights: Mapping[str, float]

    def prices(
        self, structures: Sequence[Structure], costs: Mapping[str, Tensor], total: int
    ) -> Mapping[str, float]:
        """Removing a share of the parameters lowers the loss by beta * the kind's weight."""
        return {kind: self.beta * weight for kind, weight in self.weights.items()}

    def target(self, progress: float) -> float:
        """NaN: a penalty has no target sparsity."""
        return math.nan

    def regulariser(self, removed: Mapping[str, Tensor], progress: float) -> Tensor:
        """beta * sum of w * P(gate > 0), w the unit's share of the parameters times its kind's
        weight."""
        kept = [self.weights[k] * (self.maskable[k] - share) for k, share in removed.items()]
        return self.beta * torch.stack(kept).sum()

    def ascend(self, sparsity: float, progress: float) -> None:
        """Nothing to update: beta is fixed."""


@dataclass
class Budget:
    """l1 (s* - s) + l2 (s* - s)^2: Lagrange multipliers that hold the expected sparsity s at s*.

    The target s* rises over the first iterations (warm-up); l1 and l2 follow by gradient ascent.
    l2 starts high: from a flat start all logits are equal and would close together, far past the
    target, if only the slowly growing l1 could pull them back.

    Attributes:
        sparsity: the full target.
        warmup: share of the iterations over which the target rises, 0 to 1.
        lr: learning rate of the ascent.
        linear: l1.
        quadratic: l2.
    """

    sparsity: float
    warmup: float
    lr: float
    linear: float = 0.0
    quadratic: float = 30.0

    def prices(
        self, structures: Sequence[Structure], costs: Mapping[str, Tensor], total: int
    ) -> Mapping[str, float]:
        """The cost of the cheapest unit that stays when the cheapest are removed up to the target;
        the same for all kinds."""
        every = torch.cat([costs[s.name].sort().values for s in structures])
        sizes = torch.cat([s.sizes() for s in structures])
        order = every.argsort(stable=True)
        gone = int((sizes[order].cumsum(0) <= self.sparsity * total).sum())
        price = every[order[min(gone, len(order) - 1)]].item()
        return {s.kind: price for s in structures}

    def target(self, progress: float) -> float:
        """s* at `progress`: rises linearly over the first `warmup` of the iterations."""
        return self.sparsity * min(1.0, progress / self.warmup if self.warmup else 1.0)

    def regulariser(self, removed: Mapping[str, Tensor], progress: float) -> Tensor:
        """l1 (s* - s) + l2 (s* - s)^2, a scalar; a positive l1 pulls s up."""
        gap = self.target(progress) - torch.stack([*removed.values()]).sum()
        return self.linear * gap + self.quadratic * gap.square()

    def ascend(self, sparsity: float, progress: float) -> None:
        """One step of gradient ascent on l1 and l2."""
        gap = self.target(progress) - sparsity
        self.linear += self.lr * gap
        self.quadratic += self.lr * gap**2
