"""Scores that need no data, and sums over the weights of a unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ecodiff.models.units import Port, Structure


@torch.no_grad()
def magnitude(denoiser: nn.Module, structures: Sequence[Structure]) -> dict[str, Tensor]:
    """Root mean square of a unit's weights: its rows of producers and its columns of consumers.

    Returns:
        Structure name -> fp32 (units,), on the CPU.
    """

    def squares(module: str) -> Tensor:
        return denoiser.get_submodule(module).weight.float().square()

    return {
        s.name: (sum_over_unit(s, squares) / weights_of_unit(denoiser, s)).sqrt()
        for s in structures
    }


def random(structures: Sequence[Structure], seed: int) -> dict[str, Tensor]:
    """Uniform random scores in [0, 1): structure name -> fp32 (units,), on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return {s.name: torch.rand(s.units, generator=generator) for s in structures}


def ranks(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace scores by ranks within each structure, in (0, 1), so that a global selection removes
    the same share of each structure.

    Infinite scores (of units that are removed last) stay infinite.

    Returns:
        Structure name -> (units,).
    """
    return {
        name: torch.where(
            values.isinf(), values, (values.argsort(stable=True).argsort() + 0.5) / len(values)
        )
        for name, values in scores.items()
    }


def sum_over_unit(structure: Structure, values: Callable[[str], Tensor]) -> Tensor:
    """Sum one value per weight (such as its square) over the weights of each unit.

    Args:
        structure: whose units.
        values: maps the name of a linear to a tensor shaped as its weight.

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
    """Sum one value per row (or column) of a linear over those that each unit owns.

    Args:
        structure: whose units.
        port: the linear.
        lines: one value for each row of a producer, or each column of a consumer: (out,) or (in,).

    Returns:
        fp32 (units,), on the CPU.
    """
    owned = lines.float().cpu()[structure.columns(port, torch.arange(structure.units))]
    return owned.view(len(port.offsets), structure.units, port.width).sum((0, 2))


def weights_of_unit(denoiser: nn.Module, structure: Structure) -> int:
    """The number of weights of one unit, without biases."""
    count = 0
    for ports, axis in ((structure.producers, 0), (structure.consumers, 1)):
        for port in ports:
            weight = denoiser.get_submodule(port.module).weight
            count += len(port.offsets) * port.width * weight.numel() // weight.shape[axis]
    return count
