"""What a unit costs a user: the budget that a sparsity is a share of (`mask.budget`).

Everything that selects reads what a unit weighs from its structure, so a budget is a copy of the
structures with other weights, and another total.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ecodiff.calibrate import Calibration, rows_of, watched
from ecodiff.mask.latency import latencies, where
from ecodiff.models.structures import Modulation, count_parameters, denoiser_of, discover
from ecodiff.models.units import Port, Structure
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.workers import Workers


@dataclass(frozen=True)
class Prices:
    """What the units and the whole denoiser cost, in whole units of the budget.

    Attributes:
        budget: `macs` (multiply-adds of one picture), `memory` (bytes of weights) or `latency`
            (nanoseconds of one picture).
        total: of the denoiser; for latency, of the whole loop.
        units: structure name -> of one unit; 0 for units that are never removed for this budget.
        of: what else they depend on: the call, and for latency device and dtype.
    """

    budget: str
    total: int
    units: Mapping[str, int]
    of: Mapping[str, Any] = field(default_factory=dict)

    def applied(self, structures: Sequence[Structure]) -> list[Structure]:
        """The structures with these prices in the place of their numbers of parameters."""
        return [
            replace(
                s,
                unit_parameters=self.units[s.name],
                overhead=s.overhead * self.units[s.name] // s.unit_parameters,
            )
            for s in structures
        ]


def prices_of(
    pipe: DiffusionPipeline,
    structures: Sequence[Structure],
    budget: str,
    calibration: Calibration | None,
) -> Prices | None:
    """The prices of all units; None where the budget is parameters.

    Raises:
        UserError: MACs or latency are asked for and there is no calibration that tells the call.
    """
    if budget == "parameters":
        return None
    if budget == "memory":
        return _memory(denoiser_of(pipe), structures)
    if calibration is None:
        raise UserError(f"mask.budget: {budget} depends on the call, so it needs a calibration")
    calibration = calibration.for_dense(pipe)
    if budget == "macs":
        return _macs(pipe, structures, calibration)
    total, units = latencies(pipe, structures, calibration)
    measured = torch.tensor([total, *units.values()], dtype=torch.float64)
    Workers(denoiser_of(pipe).device).average([measured])  # all learn with the same prices
    total, *each = measured.round().long().tolist()
    units = dict(zip(units, each, strict=True))
    return Prices("latency", total, units, {"call": calibration.call, **where(pipe)})


def budgeted(
    pipe: DiffusionPipeline, modulation: Modulation, prices: Prices | None
) -> tuple[list[Structure], int]:
    """The structures of a model with what their units weigh in a budget, and the budget's total."""
    structures = discover(pipe, modulation)
    if prices is None:
        return structures, count_parameters(denoiser_of(pipe))
    return prices.applied(structures), prices.total


def _memory(denoiser: nn.Module, structures: Sequence[Structure]) -> Prices:
    """Bytes of weights and biases in the dtype that each has."""
    total = sum(p.numel() * p.element_size() for p in denoiser.parameters())
    units = {}
    for s in structures:
        names = [s.directions_of] if s.directions_of else [p.module for p in _ports(s)]
        sizes = {denoiser.get_submodule(name).weight.element_size() for name in names}
        units[s.name] = s.unit_parameters * max(sizes)
    return Prices("memory", total, units)


def _macs(
    pipe: DiffusionPipeline, structures: Sequence[Structure], calibration: Calibration
) -> Prices:
    """Multiply-adds of linears, convolutions and attention, exact by the shapes of one picture at
    the call's size: all steps and guidance branches."""
    denoiser, rows = denoiser_of(pipe), Counter[str]()
    names = {port.module for s in structures for port in _ports(s)}
    names |= {s.directions_of for s in structures if s.directions_of}
    names = sorted(names)

    def count(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        rows[name] += len(rows_of(layer, args[0]))

    with watched(denoiser, names, count), _counted(denoiser) as macs:
        calibration.of([0]).drawn_by(pipe, 1)
    units = {}
    for s in structures:
        if s.directions_of:
            units[s.name] = s.unit_parameters * rows[s.directions_of]
            continue
        units[s.name] = sum(_line(denoiser, p, 0) * p.width * rows[p.module] for p in s.producers)
        units[s.name] += sum(_line(denoiser, p, 1) * p.width * rows[p.module] for p in s.consumers)
        if s.kind == "heads":  # what is no linear: queries with keys, weights with values
            owner = s.name.removesuffix(".heads")
            units[s.name] += (macs[owner] - _of_layers(macs, owner, denoiser)) // s.units
    return Prices("macs", macs[""], units, {"call": calibration.call})


def _of_layers(macs: Mapping[str, int], owner: str, denoiser: nn.Module) -> int:
    inside = denoiser.get_submodule(owner).named_modules()
    return sum(macs[f"{owner}.{name}"] for name, part in inside if isinstance(part, nn.Linear))


@contextmanager
def _counted(denoiser: nn.Module) -> Iterator[Counter[str]]:
    """On exit the counter holds the multiply-adds of each module by name; of all under ""."""
    found, counter, root = Counter[str](), FlopCounterMode(display=False), type(denoiser).__name__
    with counter:
        yield found
    for module, operations in counter.get_flop_counts().items():
        first, _, name = module.partition(".")
        if first == root:
            found[name] = sum(operations.values()) // 2


def _line(denoiser: nn.Module, port: Port, dim: int) -> int:
    """Weights of one row (dim 0) or column (dim 1) of a layer, for all offsets of a unit."""
    weight = denoiser.get_submodule(port.module).weight
    return len(port.offsets) * weight.numel() // weight.shape[dim]


def _ports(structure: Structure) -> tuple[Port, ...]:
    return (*structure.producers, *structure.consumers)
