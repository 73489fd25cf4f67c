"""What a structure is: a set of equal units, and the rows and columns of linears that they own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["heads", "neurons", "modulation"]
Side = Literal["rows", "columns"]


@dataclass(frozen=True)
class Port:
    """A linear with the rows or columns of it that a structure's units own.

    Attributes:
        module: dotted name of the `nn.Linear` (or `nn.Conv2d`) in the denoiser.
        offsets: unit `u` owns rows (of a producer) or columns (of a consumer)
            `[o + u * width, o + (u + 1) * width)` for each offset `o`. GEGLU's projection, whose
            rows are two halves, has `(0, inner)`; one that gives queries, keys and values, three.
        width: rows or columns of one unit behind each offset: the head dimension, or 1. Where
            several query heads share a key, a unit owns more rows of the queries than of the keys.
    """

    module: str
    offsets: tuple[int, ...] = (0,)
    width: int = 1


@dataclass(frozen=True)
class Structure:
    """A set of equal units that can be gated and cut out (EcoDiff, "structural pruning").

    Attributes:
        name: `<owning module>.<kind>`; unique and stable.
        kind: `heads`, `neurons` or `modulation`.
        units: how many there are.
        producers: linears that lose rows of the weight, and of the bias unless it is modulation.
        consumers: linears that lose input columns; empty for modulation.
        unit_parameters: parameters that are removed with one unit: weights, and the producers'
            biases unless it is modulation.
        directions_of: the linear whose input's directions are the units, see
            `trajectory.directions`; "" for all other structures. It becomes two linears of a rank
            as large as the number of units that stay, so one unit is a row of the first and a
            column of the second; it has no ports.
        overhead: parameters that come with the first unit that goes: of the second linear.
    """

    name: str
    kind: Kind
    units: int
    producers: tuple[Port, ...]
    consumers: tuple[Port, ...]
    unit_parameters: int
    directions_of: str = ""
    overhead: int = 0

    @property
    def width(self) -> int:
        """Columns of a consumer that one unit owns; rows of a modulation linear."""
        ports = (*self.consumers, *self.producers)
        return ports[0].width if ports else 1

    @property
    def together(self) -> int:
        """How many units go together or not at all: the first that pay for the overhead."""
        return self.overhead // max(1, self.unit_parameters) + 1

    def sizes(self) -> Tensor:
        """Parameters that are removed with the first unit that goes, the second, ...: int64
        (units,). With directions, nothing before as many are gone as pay."""
        reached = torch.arange(self.units + 1) * self.unit_parameters - self.overhead
        return reached.clamp(min=0).diff()

    def removed(self, units: int) -> int:
        """Parameters that are removed with so many of the units."""
        return units * self.unit_parameters - (self.overhead if units else 0)

    def columns(self, port: Port, units: Tensor) -> Tensor:
        """Rows or columns of `port` that the given units own.

        Args:
            port: one of this structure's ports.
            units: int64 (k,), unit indices.

        Returns:
            int64 (offsets * k * width,), on the device of `units`; grouped by offset and, inside a
            group, in the order of `units`, so a linear indexed by it keeps its packed layout.
        """
        within = torch.arange(port.width, device=units.device)
        block = (units[:, None] * port.width + within).flatten()
        return torch.cat([block + offset for offset in port.offsets])


def lines_left(
    denoiser: nn.Module, structures: Iterable[Structure], kept: Mapping[str, Tensor], side: Side
) -> dict[str, Tensor]:
    """Rows that stay of each producer, or input columns of each consumer, jointly over all
    structures that cut it.

    Args:
        denoiser: has the linears.
        structures: those that `kept` doesn't name stay whole.
        kept: structure name -> int64 (k,), units that stay.
        side: rows are of the structures that have consumers, columns are of those consumers.

    Returns:
        Module name -> int64 (lines kept,), ascending, on the CPU.
    """
    stays: dict[str, Tensor] = {}
    for structure in structures:
        if structure.name not in kept or not structure.consumers:
            continue
        gone = torch.ones(structure.units, dtype=torch.bool)
        gone[kept[structure.name].cpu()] = False
        for port in structure.producers if side == "rows" else structure.consumers:
            size = denoiser.get_submodule(port.module).weight.shape[side == "columns"]
            mask = stays.setdefault(port.module, torch.ones(size, dtype=torch.bool))
            mask[structure.columns(port, gone.nonzero().flatten())] = False
    return {module: mask.nonzero().flatten() for module, mask in stays.items()}
