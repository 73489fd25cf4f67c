"""What variants cost: size, work, time and memory, all measured in one process and in turns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ecodiff.config.sections import EfficiencySettings
from ecodiff.evaluate.memory import MB, peak_memory, tensors_of
from ecodiff.models.families import Call
from ecodiff.models.pipelines import decode, denoise, encode, starting_noise
from ecodiff.models.structures import count_parameters, denoiser_of
from ecodiff.runtime import timing


def efficiency(
    pipe: DiffusionPipeline,
    denoisers: Mapping[str, Callable[[], nn.Module]],
    prompts: list[str],
    seeds: list[int],
    call: Call,
    settings: EfficiencySettings,
) -> dict[str, dict[str, float | str]]:
    """Measures variants that differ in the denoiser alone.

    Each measurement is of all that `generate` does, from prompts to images: text encoders, all
    denoising steps with their guidance branches, and the VAE. One denoiser at a time is on the
    device beside the rest of the pipeline, and host memory holds the dense one and no other: each
    variant is loaded anew for each of its turns, untimed.

    Args:
        pipe: the dense pipeline, on the device to measure on. Its denoiser is put back at the end.
        denoisers: variant name -> what loads its denoiser, on the CPU.
        prompts, seeds: one batch of `settings.batch_size`.
        call: the `call` section of the model.

    Returns:
        variant name -> what was measured:
        parameters, denoiser_parameters: of the whole pipeline and of its denoiser.
        gmacs: 10^9 multiply-adds an image in matrix products, convolutions and attention, by
            `torch.utils.flop_counter` (which counts two operations each).
        latency_ms_per_image: median over `repeats` rounds, in each of which every variant has its
            turn, so that a slow spell of the machine meets all; latency_ms_low and
            latency_ms_high are the quartiles.
        peak_memory_mb: see `memory.peak_memory`; weights included.
        disk_mb, denoiser_disk_mb: 10^6 bytes that the weights take as safetensors, in the dtype
            that the run uses (a dense model may be shipped in another).
        device: what it ran on.
    """
    own, images = denoiser_of(pipe), len(prompts)
    slot = "transformer" if own is getattr(pipe, "transformer", None) else "unet"
    place = own.device

    def work() -> None:
        embeds, noise = encode(pipe, prompts, call), starting_noise(pipe, seeds, call)
        decode(pipe, denoise(pipe, embeds, noise, call), call)

    def turn(load: Callable[[], nn.Module], measure: Callable[[], Any]) -> Any:
        own.to("cpu")
        gc.collect()  # modules are in cycles, which would keep the last one
        denoiser = load()
        for tensor in tensors_of(denoiser):
            tensor.sum()  # or a mapped file would be read within the time that is measured
        setattr(pipe, slot, denoiser.to(place))
        try:
            return measure()
        finally:
            setattr(pipe, slot, own.to("cpu"))

    try:
        found = {
            name: turn(load, lambda: _size_and_work(pipe, work, images))
            for name, load in denoisers.items()
        }
        rounds = [
            {
                name: turn(load, lambda: timing.seconds(work, place))
                for name, load in denoisers.items()
            }
            for _ in range(settings.warmup + settings.repeats)
        ]
    finally:
        setattr(pipe, slot, own.to(place))
    for name, measured in found.items():
        times = [1e3 * one[name] / images for one in rounds[settings.warmup :]]
        low, median, high = np.percentile(times, [25, 50, 75])
        measured |= {
            "latency_ms_per_image": float(median),
            "latency_ms_low": float(low),
            "latency_ms_high": float(high),
            "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU",
        }
    return found


def _size_and_work(
    pipe: DiffusionPipeline, work: Callable[[], None], images: int
) -> dict[str, float | str]:
    denoiser = denoiser_of(pipe)
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    counter = FlopCounterMode(display=False)

    def counted() -> None:
        with counter:
            work()

    peak = peak_memory(counted, tensors_of(*modules), str(denoiser.device))
    return {
        "parameters": sum(map(count_parameters, modules)),
        "denoiser_parameters": count_parameters(denoiser),
        "gmacs": counter.get_total_flops() / 2 / images / 1e9,
        "peak_memory_mb": peak,
        "disk_mb": sum(map(_stored, modules)) / MB,
        "denoiser_disk_mb": _stored(denoiser) / MB,
    }


def _stored(module: nn.Module) -> int:
    """Bytes of what a module saves; tensors that it shares with itself are saved once."""
    saved = {id(value): value for value in module.state_dict(keep_vars=True).values()}
    return sum(value.nbytes for value in saved.values())
