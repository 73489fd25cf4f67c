"""Scores that need no learning: the baselines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ecodiff.structures import Structure


@torch.no_grad()
def magnitude(denoiser: nn.Module, structures: Sequence[Structure]) -> dict[str, Tensor]:
    """Root mean square of the weights that go with a unit: producer rows and consumer columns.

    Returns structure name -> fp32 (units,), on the CPU.
    """
    return {s.name: _root_mean_square(denoiser, s) for s in structures}


def random(structures: Sequence[Structure], seed: int) -> dict[str, Tensor]:
    """Uniform scores in [0, 1) from one seed: structure name -> fp32 (units,), on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return {s.name: torch.rand(s.units, generator=generator) for s in structures}


def _root_mean_square(denoiser: nn.Module, structure: Structure) -> Tensor:
    squares, count = torch.zeros(structure.units), 0
    every = torch.arange(structure.units)
    for ports, axis in ((structure.producers, 0), (structure.consumers, 1)):
        for port in ports:
            weight = denoiser.get_submodule(port.module).weight.float()
            lines = weight.movedim(axis, 0).flatten(1).square()
            owned = lines.sum(1).cpu()[structure.columns(port, every)]
            owned = owned.view(len(port.offsets), structure.units, structure.width)
            squares += owned.sum((0, 2))
            count += len(port.offsets) * structure.width * lines.shape[1]
    return (squares / count).sqrt()
