"""From scores to the units that stay: the lowest go until enough parameters are gone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ecodiff.errors import UserError
from ecodiff.structures import Structure

Scope = Literal["global", "structure"]


def select(
    structures: Sequence[Structure],
    scores: Mapping[str, Tensor],
    sparsity: float,
    total_parameters: int,
    scope: Scope = "global",
    floor: int = 0,
) -> dict[str, Tensor]:
    """Remove the lowest units until `sparsity` of all parameters is gone (EcoDiff, "ranking").

    The removed parameters reach the target and overshoot it by less than one unit. Ties go in the
    order of the structures and of the units within.

    Args:
        structures: all structures of the denoiser.
        scores: structure name -> (units,), higher is more important; used as they are.
        sparsity: share of `total_parameters` to remove.
        total_parameters: of the dense denoiser, maskable or not.
        scope: `global` ranks all units against each other; `structure` takes the same share of
            units from each structure.
        floor: how many units, its best ones, each structure keeps at least.

    Returns:
        Structure name -> bool (units,), true for units that stay.

    Raises:
        UserError: scores don't fit the structures or are NaN, or `sparsity` cannot be reached.
    """
    check_scores(structures, scores)
    orders = [scores[s.name].float().cpu().argsort(stable=True) for s in structures]
    removable = [
        order[: max(s.units - floor, 0)] for s, order in zip(structures, orders, strict=True)
    ]
    if scope == "global":
        keys = [scores[s.name].float().cpu()[u] for s, u in zip(structures, removable, strict=True)]
    else:
        keys = [
            (torch.arange(len(units)) + 0.5) / s.units
            for s, units in zip(structures, removable, strict=True)
        ]
    owners = torch.cat([torch.full((len(u),), i) for i, u in enumerate(removable)])
    units, order = torch.cat(removable), torch.cat(keys).argsort(stable=True)
    sizes = torch.tensor([s.unit_parameters for s in structures])[owners[order]]
    gone = order[: _count(sizes, sparsity, total_parameters, floor)]
    kept = {s.name: torch.ones(s.units, dtype=torch.bool) for s in structures}
    for i, structure in enumerate(structures):
        kept[structure.name][units[gone[owners[gone] == i]]] = False
    return kept


def removed_share(
    structures: Sequence[Structure], kept: Mapping[str, Tensor], total_parameters: int
) -> float:
    """The exact sparsity of a mask: removed parameters as a share of all of the denoiser's."""
    removed = sum(int((~kept[s.name]).sum()) * s.unit_parameters for s in structures)
    return removed / total_parameters


def check_scores(structures: Sequence[Structure], scores: Mapping[str, Tensor]) -> None:
    """Raise `UserError` unless there is one finite-or-infinite score a unit of each structure."""
    sizes = {s.name: s.units for s in structures}
    for name in sorted(sizes.keys() ^ scores.keys()):
        what = "has no scores" if name in sizes else "is no structure of this model"
        raise UserError(f"mask: {name} {what}; was it made for another model?")
    for name, units in sizes.items():
        if scores[name].shape != (units,):
            found = tuple(scores[name].shape)
            raise UserError(f"mask: {name} has scores of shape {found}, must be ({units},)")
        if scores[name].isnan().any():
            raise UserError(f"mask: {name} has scores that are not a number")


def _count(sizes: Tensor, sparsity: float, total: int, floor: int) -> int:
    """How many of the ranked units must go; `sizes` int64 (n,), their parameters."""
    # Parameters come whole: the margin keeps 0.1 * 30 = 3.0000000000000004 from asking for 4.
    target = sparsity * total - 1e-6
    reached = sizes.cumsum(0)
    maximum = int(reached[-1]) if len(reached) else 0
    if not (sparsity >= 0 and target <= maximum):
        shown = math.floor(maximum / total * 1e4) / 1e4
        left = f"{floor} units" if floor else "no unit"
        raise UserError(
            f"sparsity: {sparsity} is not possible; the range is 0 to {shown:.4f} of the denoiser's"
            f" parameters, where {left} of a structure would be left"
        )
    return 0 if target <= 0 else int(torch.searchsorted(reached.double(), target)) + 1
