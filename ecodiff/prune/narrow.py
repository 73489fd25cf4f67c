"""Narrow the linears of a denoiser to the units that stay.

`W[:, keep] @ x[keep] == W @ (m * x)` for a 0/1 mask m: cutting rows of the producers and columns of
the consumers gives the same output as masking (EcoDiff, "structural pruning"). An attention that
loses all its heads is replaced by `NoHeads`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ecodiff.models.pruned import ScatterLinear, packed, set_heads, take
from ecodiff.models.structures import Structure


def narrow(
    denoiser: nn.Module, structures: Iterable[Structure], kept: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Cut the linears of a dense denoiser in place.

    Args:
        denoiser: the dense denoiser; any device, including `meta`.
        structures: its structures.
        kept: structure name -> int64 (k,), indices of the units that stay, ascending; k may be 0.
            Structures that are not named stay whole.

    Returns:
        The entry `pruned` of the denoiser's config, see `ecodiff.models.pruned`.
    """
    structures = [s for s in structures if s.name in kept]
    scattered, heads = [], {}
    stays: dict[str, dict[str, str]] = defaultdict(dict)
    for module, columns in consumer_columns(denoiser, structures, kept).items():
        linear = denoiser.get_submodule(module)
        stays[module]["columns"] = packed(_among(linear.weight.shape[1], columns))
        take(linear, 1, columns)
    for structure in structures:
        units = kept[structure.name]
        for port in structure.producers:
            rows, linear = structure.columns(port, units), denoiser.get_submodule(port.module)
            if structure.kind == "modulation":
                denoiser.set_submodule(port.module, ScatterLinear(linear, rows))
                scattered.append(port.module)
            else:
                stays[port.module]["rows"] = packed(_among(linear.weight.shape[0], rows))
                take(linear, 0, rows)
        if structure.kind == "heads":
            owner = structure.name.removesuffix(".heads")
            set_heads(denoiser, owner, len(units))
            heads[owner] = len(units)
    layers = dict(denoiser.named_modules())
    ports = {port.module for s in structures for port in (*s.producers, *s.consumers)}
    # The q, k and v projections of an attention without heads no longer exist.
    parts = {name: layers[name] for name in sorted(ports & layers.keys())}
    shapes = {n: list(getattr(part, "rows", part).weight.shape) for n, part in parts.items()}
    return {"shapes": shapes, "scattered": scattered, "heads": heads, "kept": dict(stays)}


def _among(size: int, places: Tensor) -> Tensor:
    """Bool (size,), true at the given places."""
    return torch.zeros(size, dtype=torch.bool).index_fill(0, places.cpu(), True)


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
