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

from ecodiff.models.pruned import ScatterLinear, packed, set_heads, take, tell_block, unpacked
from ecodiff.models.structures import Structure


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

    def cut(module: str, side: str, places: Tensor) -> None:
        """Cut rows or columns, and note which ones of the dense layer are left."""
        layer, dim = denoiser.get_submodule(module), ("rows", "columns").index(side)
        sides, size = stays[module], layer.weight.shape[dim]
        now = unpacked(sides[side]) if side in sides else torch.ones(size, dtype=torch.bool)
        left = now.nonzero().flatten()[places.cpu()]
        sides[side] = packed(torch.zeros_like(now).index_fill(0, left, True))
        take(layer, dim, places)
        if side == "rows":
            tell_block(denoiser, module, size)

    for module, columns in consumer_columns(denoiser, structures, kept).items():
        cut(module, "columns", columns)
    for structure in structures:
        units = kept[structure.name]
        for port in structure.producers:
            rows = structure.columns(port, units)
            if structure.kind == "modulation":
                scattered += _scatter(denoiser, port.module, rows)
            else:
                cut(port.module, "rows", rows)
        if structure.kind == "heads":
            owner = structure.name.removesuffix(".heads")
            set_heads(denoiser, owner, len(units))
            heads[owner] = len(units)
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


def consumer_columns(
    denoiser: nn.Module, structures: Iterable[Structure], kept: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Input columns that stay of each consumer, jointly over all structures that cut it.

    Returns:
        Module name -> int64 (columns kept,), ascending, on the CPU.
    """
    stays: dict[str, Tensor] = {}
    for structure in structures:
        if structure.name not in kept:
            continue
        gone = torch.ones(structure.units, dtype=torch.bool)
        gone[kept[structure.name].cpu()] = False
        for port in structure.consumers:
            width = denoiser.get_submodule(port.module).weight.shape[1]
            mask = stays.setdefault(port.module, torch.ones(width, dtype=torch.bool))
            mask[structure.columns(port, gone.nonzero().flatten())] = False
    return {module: mask.nonzero().flatten() for module, mask in stays.items()}
