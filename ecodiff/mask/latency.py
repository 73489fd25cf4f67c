"""What a unit costs in time, measured on this device: layers as they are and with half their units.

An attention or feed-forward is timed where it runs, in whole pictures, and by itself: as it is and
cut in half, by turns. Its share of the picture times the share of it that the half saves, over the
units that went, is a unit's price. All are ratios of neighbouring times, so that a slow spell of
the machine meets both. Layers of the same shapes on inputs of the same shapes are cut once.
Modulation has no price: it takes no time to speak of, so its units stay.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ecodiff.calibrate import Calibration
from ecodiff.models.pruned import heads_of, set_heads, take, tell_widths
from ecodiff.models.structures import denoiser_of
from ecodiff.models.units import Port, Structure, lines_left
from ecodiff.runtime.timing import now, seconds

ROUNDS = 25
PICTURES = 5
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
    layers = {s.name: _layer(s) for s in structures if s.consumers}
    reads: dict[str, Read] = {}
    totals, shares = [], []
    for _ in range(PICTURES):
        with _timed(denoiser, {*layers.values()}, reads) as spent:
            totals.append(seconds(lambda: one.drawn_by(pipe, 1), denoiser.device))
        shares.append({name: spent[name] / totals[-1] for name in spent})
    total, known = median(totals), dict[Any, float]()
    units = dict.fromkeys((s.name for s in structures), 0)
    for s in structures:
        if s.name not in layers or layers[s.name] not in reads:
            continue
        name = layers[s.name]
        layer, read = denoiser.get_submodule(name), reads[name]
        kind = (type(layer), s.kind, s.units, s.width, s.unit_parameters, _shapes(read))
        if kind not in known:
            known[kind] = _saved(layer, _inside(s, name), read, denoiser.device)
        share = median(one[name] for one in shares)
        units[s.name] = round(NANO * total * share * known[kind])
    return round(NANO * total), units


def _layer(structure: Structure) -> str:
    """The module that holds all of a structure's linears: the attention, feed-forward or block."""
    owner = structure.name.rpartition(".")[0]
    modules = [port.module for port in (*structure.producers, *structure.consumers)]
    if all(name.startswith(f"{owner}.") for name in modules):
        return owner
    return owner.rpartition(".")[0]  # attention of a parallel block, whose output is the block's


@contextmanager
def _timed(
    denoiser: nn.Module, names: Iterable[str], reads: dict[str, Read]
) -> Iterator[dict[str, float]]:
    """Inside the context the dict gathers each layer's seconds; `reads` keeps its first inputs."""
    spent: dict[str, float] = defaultdict(float)
    device = denoiser.device

    def begin(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reads.setdefault(name, (args, kwargs))
        spent[name] -= now(device)

    def end(name: str, *_: Any) -> None:
        spent[name] += now(device)

    handles = []
    for name in names:
        layer = denoiser.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(partial(begin, name), with_kwargs=True))
        handles.append(layer.register_forward_hook(partial(end, name)))
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def _shapes(read: Read) -> tuple[Any, ...]:
    args, kwargs = read
    return tuple(tuple(x.shape) for x in (*args, *kwargs.values()) if isinstance(x, Tensor))


def _inside(structure: Structure, layer: str) -> Structure:
    """The structure with names as the layer knows them."""

    def renamed(ports: Sequence[Port]) -> tuple[Port, ...]:
        return tuple(replace(p, module=p.module.removeprefix(f"{layer}.")) for p in ports)

    name = structure.name.removeprefix(layer).removeprefix(".")
    producers, consumers = renamed(structure.producers), renamed(structure.consumers)
    return replace(structure, name=name, producers=producers, consumers=consumers)


def _saved(layer: nn.Module, structure: Structure, read: Read, device: torch.device) -> float:
    """The share of a layer's time that goes with one unit."""
    args, kwargs = read
    half = _halved(layer, structure)
    saved = []
    for _ in range(ROUNDS):
        whole, left = (
            seconds(lambda part=part: part(*args, **kwargs), device) for part in (layer, half)
        )
        saved.append(1 - left / whole)
    return max(0.0, median(saved)) / (structure.units - structure.units // 2)


def _halved(layer: nn.Module, structure: Structure) -> nn.Module:
    """A copy of a layer with the first half of a structure's units."""
    half, left = copy.deepcopy(layer), {structure.name: torch.arange(structure.units // 2)}
    for dim, side in enumerate(("rows", "columns")):
        for module, lines in lines_left(half, [structure], left, side).items():
            take(half.get_submodule(module), dim, lines)
    if structure.kind == "heads" and structure.units > 1:
        owner = structure.name.removesuffix("heads").removesuffix(".")
        group = heads_of(half.get_submodule(owner)) // structure.units
        set_heads(half, owner, group * (structure.units // 2))
    tell_widths(half)
    return half


def where(pipe: DiffusionPipeline) -> Mapping[str, str]:
    """The device that latencies are of."""
    device = denoiser_of(pipe).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "dtype": str(denoiser_of(pipe).dtype).removeprefix("torch.")}
