"""From scores to the units that stay: remove the lowest until enough parameters are removed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from ecodiff.config.sections import MaskSettings
from ecodiff.models.units import Structure
from ecodiff.runtime.errors import UserError

Scope = Literal["global", "structure"]


def select(
    structures: Sequence[Structure],
    scores: Mapping[str, Tensor],
    sparsity: float,
    total_parameters: int,
    *,
    scope: Scope = "global",
    floor: int = 0,
    align: int = 1,
    budget: str = "parameters",
    exclude: Sequence[str] = (),
    limits: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Remove the units with the lowest scores until `sparsity` of all parameters is removed
    (EcoDiff, "ranking").

    Removed parameters reach the target and overshoot it by less than one unit, or one group of
    units that `align` ties. Directions of a linear's input pay only once enough of them are gone:
    these go as one group, ranked by their mean score. Units with equal scores are removed in the
    order of structures, then of units.

    Args:
        structures: all structures of the denoiser.
        scores: structure name -> (units,), higher is more important.
        sparsity: share of `total_parameters` to remove.
        total_parameters: all parameters of the dense denoiser, also those that no unit owns.
        scope: `global` ranks all units against each other; `structure` removes the same share of
            units from each structure.
        floor: minimum number of units that each structure keeps; the highest scores stay.
        align: neurons and heads are removed in groups, ranked by their mean score, so that linears
            that lose any keep a multiple of `align` rows or columns; tensor cores are slow at other
            widths. 1: single units.
        exclude: patterns of names of structures that stay whole, see `matching`.
        limits: kind or pattern of names -> largest share of its units that a structure loses; where
            several fit, the lowest counts.
        budget: what is counted, as errors call it; see `prices` for others than parameters.

    Returns:
        Structure name -> bool (units,), true for units that stay.

    Raises:
        UserError: scores don't fit the structures or are NaN, or `sparsity` is not possible.
    """
    check_scores(structures, scores)
    if not isinstance(sparsity, Real):
        raise UserError(f"sparsity: {sparsity!r} is not a number, such as 0.2")
    ranked, floors = [], _floors(structures, floor, exclude, limits)
    for structure in structures:
        values, order = scores[structure.name].float().cpu().sort(stable=True)
        index = _groups(structure, floors[structure.name], align)
        if scope == "structure":
            values = (torch.arange(len(values)) + 0.5) / structure.units
        ranked.append((structure, order[: len(index)], values[: len(index)], index))
    counts = [int(index[-1]) + 1 if len(index) else 0 for *_, index in ranked]
    firsts = torch.tensor([0, *counts]).cumsum(0)
    index = torch.cat([own + first for (*_, own), first in zip(ranked, firsts, strict=False)])
    values = torch.cat([values for _, _, values, _ in ranked])
    parameters = torch.cat([s.sizes()[: len(own)] for s, _, _, own in ranked])
    groups = int(firsts[-1])
    members = torch.bincount(index, minlength=groups)
    # In float64 the mean of equal scores is that score: no group falls behind its successor.
    means = values.new_zeros(groups, dtype=torch.float64).index_add(0, index, values.double())
    order = (means / members).argsort(stable=True)
    sizes = torch.zeros(groups, dtype=torch.int64).index_add(0, index, parameters)
    goes = torch.zeros(groups, dtype=torch.bool)
    goes[order[: _count(sizes[order], sparsity, total_parameters, floor, budget)]] = True
    kept = {s.name: torch.ones(s.units, dtype=torch.bool) for s in structures}
    for (structure, units, _, own), first in zip(ranked, firsts, strict=False):
        kept[structure.name][units[goes[own + first]]] = False
    return kept


def limits_of(settings: MaskSettings) -> dict[str, Any]:
    """The keyword arguments of `select` that the section `mask` sets."""
    names = ("scope", "align", "budget", "exclude", "limits")
    return {**{name: getattr(settings, name) for name in names}, "floor": settings.min_units}


def matching(structures: Sequence[Structure], pattern: str) -> set[str]:
    """Names of the structures that a pattern with * and ? means, such as `*.ff_context.*`.

    Raises:
        UserError: it means none.
    """
    found = {s.name for s in structures if fnmatchcase(s.name, pattern)}
    if not found:
        names = ", ".join(s.name for s in structures[:3])
        raise UserError(f"mask: {pattern!r} means no structure of this model; there are {names}...")
    return found


def _floors(
    structures: Sequence[Structure], floor: int, exclude: Sequence[str], limits: Mapping[str, float]
) -> dict[str, int]:
    """Structure name -> how many of its units stay at least."""
    floors = dict.fromkeys((s.name for s in structures), floor)
    most = [(matching(structures, pattern), 0.0) for pattern in exclude]
    for key, share in limits.items():
        of_kind = {s.name for s in structures if s.kind == key}
        most.append((of_kind or matching(structures, key), share))
    for names, share in most:
        for s in structures:
            if s.name in names:  # the margin undoes rounding, as in `_count`
                stays = s.units - math.floor(share * s.units + 1e-6)
                floors[s.name] = max(floors[s.name], stays)
    return floors


def _groups(structure: Structure, floor: int, align: int) -> Tensor:
    """Group index of each removable unit, from the lowest score up: int64 (removable,)."""
    if not structure.unit_parameters:  # nothing is won by removing it
        return torch.arange(0)
    size = 1 if structure.kind == "modulation" else align // math.gcd(align, structure.width)
    # Size of the first group: it leaves a multiple, or is as many directions as pay.
    first = max(structure.units % size or size, structure.together)
    whole = max(structure.units - floor - first, -size) // size + 1
    removable = first + size * (whole - 1) if whole > 0 else 0
    return (torch.arange(removable) - first).div(size, rounding_mode="floor").clamp(min=-1) + 1


def removed_share(
    structures: Sequence[Structure], kept: Mapping[str, Tensor], total_parameters: int
) -> float:
    """The exact sparsity of a mask: removed parameters / all parameters of the denoiser."""
    removed = sum(s.removed(int((~kept[s.name]).sum())) for s in structures)
    return removed / total_parameters


def check_scores(structures: Sequence[Structure], scores: Mapping[str, Tensor]) -> None:
    """Raise `UserError` unless each structure has one score per unit; infinite is allowed, NaN is
    not."""
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


def _count(sizes: Tensor, sparsity: float, total: int, floor: int, budget: str) -> int:
    """How many of the ranked groups to remove.

    `sizes` int64 (groups,): the parameters of each, from the lowest score up.
    """
    # Parameters are whole numbers: the margin keeps a product such as 3.0000000000000004 from
    # asking for a fourth.
    target = sparsity * total - 1e-6
    reached = sizes.cumsum(0)
    maximum = int(reached[-1]) if len(reached) else 0
    if not (sparsity >= 0 and target <= maximum):
        shown = math.floor(maximum / total * 1e4) / 1e4
        left = f"{floor} units" if floor else "no unit"
        percent = f"; for {sparsity} % say {sparsity / 100}" if 1 < sparsity < 100 else ""
        raise UserError(
            f"sparsity: {sparsity} is not possible; the range is 0 to {shown:.4f} of the denoiser's"
            f" {budget}, where {left} of a structure would be left{percent}"
        )
    return 0 if target <= 0 else int(torch.searchsorted(reached.double(), target)) + 1
