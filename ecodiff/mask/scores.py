"""Scores that need no data, and what all scores from weights share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ecodiff.models.structures import Port, Structure


@torch.no_grad()
def magnitude(denoiser: nn.Module, structures: Sequence[Structure]) -> dict[str, Tensor]:
    """Root mean square of the weights that go with a unit: producer rows and consumer columns.

    Returns structure name -> fp32 (units,), on the CPU.
    """

    def squares(module: str) -> Tensor:
        return denoiser.get_submodule(module).weight.float().square()

    return {
        s.name: (sum_over_unit(s, squares) / weights_of_unit(denoiser, s)).sqrt()
        for s in structures
    }


def random(structures: Sequence[Structure], seed: int) -> dict[str, Tensor]:
    """Uniform scores in [0, 1) from one seed: structure name -> fp32 (units,), on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return {s.name: torch.rand(s.units, generator=generator) for s in structures}


def ranks(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each unit's rank within its structure, in (0, 1): every structure loses the same share.

    Infinite scores, of units that are not to go, stay infinite.
    """
    return {
        name: torch.where(
            values.isinf(), values, (values.argsort(stable=True).argsort() + 0.5) / len(values)
        )
        for name, values in scores.items()
    }


def sum_over_unit(structure: Structure, values: Callable[[str], Tensor]) -> Tensor:
    """Sum something that each weight has over the weights that go with a unit.

    Args:
        values: name of a linear -> a tensor shaped as its weight.

    Returns:
        fp32 (units,), on the CPU.
    """
    total = torch.zeros(structure.units)
    for ports, axis in ((structure.producers, 0), (structure.consumers, 1)):
        for port in ports:
            lines = values(port.module).movedim(axis, 0).flatten(1).sum(1)
            total += sum_over_lines(structure, port, lines)
    return total


def sum_over_lines(structure: Structure, port: Port, lines: Tensor) -> Tensor:
    """Sum something that each row (or column) of a linear has over those that a unit owns there.

    `lines` (rows of a producer or columns of a consumer,) -> fp32 (units,), on the CPU.
    """
    owned = lines.float().cpu()[structure.columns(port, torch.arange(structure.units))]
    return owned.view(len(port.offsets), structure.units, structure.width).sum((0, 2))


def weights_of_unit(denoiser: nn.Module, structure: Structure) -> int:
    """How many weights go with one unit; biases don't count."""
    count = 0
    for ports, axis in ((structure.producers, 0), (structure.consumers, 1)):
        for port in ports:
            weight = denoiser.get_submodule(port.module).weight
            count += len(port.offsets) * structure.width * weight.numel() // weight.shape[axis]
    return count
