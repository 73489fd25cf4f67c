"""Narrow the linears of a denoiser to the units that stay.

`W[:, keep] @ x[keep] == W @ (m * x)` for a 0/1 mask m: cutting rows of the producers and columns of
the consumers gives the same output as masking (EcoDiff, "structural pruning"). An attention that
loses all its heads is replaced by `NoHeads`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ecodiff.models.pruned import (
    ScatterLinear,
    heads_of,
    packed,
    set_heads,
    take,
    tell_widths,
    unpacked,
)
from ecodiff.models.units import Side, Structure, lines_left

SIDES: dict[Side, int] = {"columns": 1, "rows": 0}  # of a weight, and their dimension


def narrow(
    denoiser: nn.Module,
    structures: Iterable[Structure],
    kept: Mapping[str, Tensor],
    before: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Cut the linears of a denoiser in place.

    Args:
        denoiser: the denoiser; any device, including `meta`.
        structures: its structures.
        kept: structure name -> int64 (k,), indices of the units that stay, ascending; k may be 0.
            Structures that are not named stay whole.
        before: what an earlier pruning returned.

    Returns:
        The entry `pruned` of the denoiser's config, see `ecodiff.models.pruned`.
    """
    structures = [s for s in structures if s.name in kept]
    scattered, heads = [*before.get("scattered", ())], dict(before.get("heads", {}))
    stays = defaultdict(dict, {name: dict(sides) for name, sides in before.get("kept", {}).items()})

    lines = {side: lines_left(denoiser, structures, kept, side) for side in SIDES}
    for side, dim in SIDES.items():
        for module, places in lines[side].items():
            layer, sides = denoiser.get_submodule(module), stays[module]
            # Which lines of the dense layer are left, after an earlier pruning too.
            size = layer.weight.shape[dim]
            now = unpacked(sides[side]) if side in sides else torch.ones(size, dtype=torch.bool)
            left = now.nonzero().flatten()[places]
            sides[side] = packed(torch.zeros_like(now).index_fill(0, left, True))
            take(layer, dim, places)
    for structure in structures:
        units = kept[structure.name]
        if structure.kind == "modulation":
            for port in structure.producers:
                scattered += _scatter(denoiser, port.module, structure.columns(port, units))
        if structure.kind == "heads":
            owner = structure.name.removesuffix(".heads")
            dense = heads_of(denoiser.get_submodule(owner))
            heads[owner] = dense * len(units) // structure.units
            set_heads(denoiser, owner, heads[owner])
    tell_widths(denoiser)
    layers = dict(denoiser.named_modules())
    # The q, k and v projections of an attention without heads no longer exist.
    names = sorted({*scattered, *stays} & layers.keys())
    shapes = {n: list(getattr(layers[n], "rows", layers[n]).weight.shape) for n in names}
    return {"shapes": shapes, "scattered": scattered, "heads": heads, "kept": dict(stays)}


def _scatter(denoiser: nn.Module, module: str, rows: Tensor) -> list[str]:
    """Keep some output channels of a modulation linear. Returns its name if it was dense before."""
    owner = denoiser.get_submodule(module.removesuffix(".rows"))
    if isinstance(owner, ScatterLinear):
        owner.keep(rows)
        return []
    denoiser.set_submodule(module, ScatterLinear(owner, rows))
    return [module]
