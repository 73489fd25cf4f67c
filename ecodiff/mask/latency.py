"""What a unit costs in time, measured on this device: layers as they are and with half their units.

An attention or feed-forward is run on what it read in the first step of a picture, whole and cut in
half by turns; the difference over the units that went is a unit's price. Layers of the same shapes
on inputs of the same shapes are measured once. Modulation has no price: it takes no time to speak
of, so its units stay.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ecodiff.calibrate import Calibration
from ecodiff.models.pruned import set_heads, take
from ecodiff.models.structures import Port, Structure, denoiser_of
from ecodiff.runtime.timing import seconds

ROUNDS = 15
NANO = 1e9

# A layer's arguments, in one call.
Read = tuple[tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def latencies(
    pipe: DiffusionPipeline, structures: Sequence[Structure], calibration: Calibration
) -> tuple[int, dict[str, int]]:
    """Nanoseconds of one picture: of all that the pipeline does from noise to latents, and of one
    unit of each structure.

    Args:
        pipe: the dense pipeline, on the device that counts.
        structures: of its denoiser.
        calibration: gives prompt and call.
    """
    denoiser, one = denoiser_of(pipe), calibration.of([0])
    timed = {s.name: _layer(s) for s in structures if s.consumers}
    reads: dict[str, Read] = {}
    calls = dict.fromkeys(timed.values(), 0)
    with _recorded(denoiser, reads, calls):
        one.drawn_by(pipe, 1)
    device = denoiser.device
    whole = [seconds(lambda: one.drawn_by(pipe, 1), device) for _ in range(3)]
    known: dict[Any, float] = {}
    units = dict.fromkeys((s.name for s in structures), 0)
    for s in structures:
        if s.name not in timed or timed[s.name] not in reads:
            continue
        layer = denoiser.get_submodule(timed[s.name])
        read = reads[timed[s.name]]
        kind = (type(layer), s.kind, s.units, s.width, s.unit_parameters, _shapes(read))
        if kind not in known:
            known[kind] = _price(layer, _inside(s, timed[s.name]), read, device)
        units[s.name] = round(NANO * known[kind] * calls[timed[s.name]])
    return round(NANO * median(whole)), units


def _layer(structure: Structure) -> str:
    """The module that holds all of a structure's linears: the attention, feed-forward or block."""
    owner = structure.name.rpartition(".")[0]
    modules = [port.module for port in (*structure.producers, *structure.consumers)]
    if all(name.startswith(f"{owner}.") for name in modules):
        return owner
    return owner.rpartition(".")[0]  # attention of a parallel block, whose output is the block's


@contextmanager
def _recorded(denoiser: nn.Module, reads: dict[str, Read], calls: dict[str, int]) -> Any:
    """What each layer reads in its first call, and how often it is called."""

    def record(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reads.setdefault(name, (args, kwargs))
        calls[name] += 1

    handles = [
        denoiser.get_submodule(name).register_forward_pre_hook(
            partial(record, name), with_kwargs=True
        )
        for name in calls
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shapes(read: Read) -> tuple[Any, ...]:
    args, kwargs = read
    return tuple(tuple(x.shape) for x in (*args, *kwargs.values()) if isinstance(x, Tensor))


def _inside(structure: Structure, layer: str) -> Structure:
    """The structure with names as the layer knows them."""

    def renamed(ports: Sequence[Port]) -> tuple[Port, ...]:
        return tuple(Port(p.module.removeprefix(f"{layer}."), p.offsets) for p in ports)

    name = structure.name.removeprefix(layer).removeprefix(".")
    producers, consumers = renamed(structure.producers), renamed(structure.consumers)
    return replace(structure, name=name, producers=producers, consumers=consumers)


def _price(layer: nn.Module, structure: Structure, read: Read, device: torch.device) -> float:
    """Seconds that one unit adds to one call of a layer."""
    args, kwargs = read
    half = _halved(layer, structure)
    differences = [
        seconds(lambda: layer(*args, **kwargs), device)
        - seconds(lambda: half(*args, **kwargs), device)
        for _ in range(ROUNDS + 2)
    ]
    gone = structure.units - structure.units // 2
    return max(0.0, median(differences[2:])) / gone


def _halved(layer: nn.Module, structure: Structure) -> nn.Module:
    """A copy of a layer with the first half of a structure's units."""
    half, left = copy.deepcopy(layer), torch.arange(structure.units // 2)
    for port in structure.producers:
        take(half.get_submodule(port.module), 0, structure.columns(port, left))
    gone = torch.arange(structure.units // 2, structure.units)
    for port in structure.consumers:
        linear = half.get_submodule(port.module)
        stays = torch.ones(linear.weight.shape[1], dtype=torch.bool)
        stays[structure.columns(port, gone)] = False
        take(linear, 1, stays.nonzero().flatten())
    if structure.kind == "heads" and len(left):
        set_heads(half, structure.name.removesuffix("heads").removesuffix("."), len(left))
    return half


def where(pipe: DiffusionPipeline) -> Mapping[str, str]:
    """The device that latencies are of."""
    device = denoiser_of(pipe).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "dtype": str(denoiser_of(pipe).dtype).removeprefix("torch.")}
