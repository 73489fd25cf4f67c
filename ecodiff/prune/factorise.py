"""Replace modulation linears by two of a low rank: the directions of their input that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ecodiff.models.pruned import LowRankLinear
from ecodiff.models.units import Structure
from ecodiff.trajectory.directions import Basis


@torch.no_grad()
def factorise(
    denoiser: nn.Module,
    structures: Sequence[Structure],
    kept: Mapping[str, Tensor],
    bases: Mapping[str, Basis],
) -> dict[str, int]:
    """Write W x + b as A (B x) + b', in place; equal to gates that are closed on the others.

    With the basis of the input (see `trajectory.directions`), B are the rows of `read` and A is
    W `write`, of the directions that stay; b' = b + W mu - A B mu.

    Args:
        denoiser: the dense denoiser; on `meta` only shapes are set, and bases are not read.
        structures: its structures.
        kept: structure name -> int64 (k,), units that stay.
        bases: linear name -> basis.

    Returns:
        Linear name -> rank, the entry `ranks` of `ecodiff.models.pruned`.
    """
    ranks = {}
    for structure in structures:
        if not structure.directions_of or structure.name not in kept:
            continue
        name, units = structure.directions_of, kept[structure.name]
        linear = denoiser.get_submodule(name)
        low = LowRankLinear(linear, len(units))
        if not linear.weight.is_meta:
            _write(low, linear, bases[name], units)
        denoiser.set_submodule(name, low)
        ranks[name] = len(units)
    return ranks


def _write(low: LowRankLinear, linear: nn.Linear, basis: Basis, units: Tensor) -> None:
    weight = linear.weight.double()
    mean, read, write = (part.to(weight) for part in (basis.mean, basis.read, basis.write))
    # A basis ends where directions move nothing more; the rest of them are zeros.
    spare = linear.in_features - len(read)
    units = units.to(weight.device)
    down = nn.functional.pad(read, (0, 0, 0, spare))[units]
    up = weight @ nn.functional.pad(write, (0, spare))[:, units]
    bias = weight @ mean - up @ (down @ mean)
    low.down.weight.copy_(down)
    low.up.weight.copy_(up)
    low.up.bias.copy_(bias if linear.bias is None else bias + linear.bias.double())
