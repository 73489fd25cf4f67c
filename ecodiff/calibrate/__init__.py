"""What the dense model does on the calibration prompts, recorded once.

Text encoders are needed here and not again: prompts are encoded, noise is drawn and z0 computed
once, then read from the cache. A cache knows which model and call it is of.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ecodiff.models.calls import check_call, log_cut_prompts, why_not_finite
from ecodiff.models.families import Call
from ecodiff.models.libraries import without_compiling
from ecodiff.models.pipelines import (
    check_fingerprint,
    denoise,
    encode,
    fingerprint,
    latent_dtype,
    starting_noise,
)
from ecodiff.models.structures import denoiser_of, discover, modulation_linears
from ecodiff.runtime.artifacts import atomic
from ecodiff.runtime.errors import UserError
from ecodiff.trajectory.directions import conditioned, tied, untied


@dataclass
class Calibration:
    """The dense model's inputs and final latents, on the CPU.

    Attributes:
        prompts: n captions.
        seeds: n seeds of the starting noise, all different.
        embeds: keyword arguments of the pipeline's call, each (n, ...).
        noise: starting noise (n, ...), in the layout of the pipeline.
        z0: final latents of the dense model, shaped as `noise`.
        call: the `call` section of the model.
        fingerprint: of the dense model, see `pipelines.fingerprint`.
        means: what units give on average over prompts, steps, guidance branches and tokens, where
            a bias can give it in their place: a consumer -> the mean of its input, (in,); a
            modulation linear -> the mean of its output, (out,). float32.
        moments: linear that reads the conditioning alone -> second moments of its input, see
            `directions.conditioned`.
        file: what errors call it.
    """

    prompts: list[str]
    seeds: list[int]
    embeds: dict[str, Tensor]
    noise: Tensor
    z0: Tensor
    call: Call
    fingerprint: str
    means: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    file: str = "calibration"

    def batch(
        self, indices: Sequence[int], device: torch.device | str = "cpu"
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Embeddings, starting noise and z0 of some prompts, in the given order, on a device."""
        rows = torch.as_tensor(indices)
        embeds = {key: value[rows].to(device) for key, value in self.embeds.items()}
        return embeds, self.noise[rows].to(device), self.z0[rows].to(device)

    def batches(
        self, size: int, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        """All prompts in order, `size` of them at a time, as `batch` gives them."""
        return (self.batch(chunk, device) for chunk in _chunks(len(self.prompts), size))

    def first(self, count: int | None) -> Self:
        """The same of the first prompts alone, or of all where there are no more; None: all."""
        if count is None or count >= len(self.prompts):
            return self
        return self.of(range(count))

    def of(self, rows: Sequence[int]) -> Self:
        """The same of some prompts alone, in the given order."""
        embeds, noise, z0 = self.batch(rows)
        prompts, seeds = [self.prompts[i] for i in rows], [self.seeds[i] for i in rows]
        return replace(self, prompts=prompts, seeds=seeds, embeds=embeds, noise=noise, z0=z0)

    def drawn_by(self, pipe: DiffusionPipeline, batch_size: int) -> Tensor:
        """What `pipe`, pruned or gated, makes of the same prompts and noise: shaped as `z0`."""
        batches = self.batches(batch_size, denoiser_of(pipe).device)
        return torch.cat([denoise(pipe, e, noise, self.call).cpu() for e, noise, _ in batches])

    def check(self, pipe: DiffusionPipeline) -> None:
        """Raise `UserError` when this was recorded from another model than `pipe`."""
        check_fingerprint(self.file, self.fingerprint, fingerprint(pipe), pipe)

    def for_dense(self, pipe: DiffusionPipeline) -> Self:
        """The same in the dtype of the dense model `pipe`, see `check`."""
        self.check(pipe)
        dtype, latent = denoiser_of(pipe).dtype, latent_dtype(pipe)
        embeds = {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in self.embeds.items()
        }
        return replace(self, embeds=embeds, noise=self.noise.to(latent), z0=self.z0.to(latent))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {f"embeds.{key}": value for key, value in self.embeds.items()}
        tensors |= {f"means.{key}": value for key, value in self.means.items()}
        moments, names = untied(self.moments)
        tensors |= {f"moments.{key}": value for key, value in moments.items()}
        info = {key: getattr(self, key) for key in ("prompts", "seeds", "call", "fingerprint")}
        info["moments"] = names
        write(path, {**tensors, "noise": self.noise, "z0": self.z0}, info)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Raises `UserError` when the file is missing or not one, or a
        latent is not finite."""
        tensors, info = read(path)
        parts = {part: popped(tensors, f"{part}.") for part in ("embeds", "means", "moments")}
        parts["moments"] = tied(parts["moments"], info.pop("moments", {}))
        found = built(cls, path, {**tensors, **info, **parts, "file": str(path)})
        _refuse_not_finite(found.file, found.z0, found.seeds)
        return found


def calibrate(
    pipe: DiffusionPipeline, prompts: list[str], seeds: list[int], call: Call, batch_size: int
) -> Calibration:
    """Record the dense model on the prompts (EcoDiff, "end-to-end objective": the target z0).

    Raises `UserError` when there are no prompts, one is no text, seeds don't match them in number,
    are equal or out of range, `call` doesn't fit the pipeline, or a final latent is not finite.
    """
    prompts, seeds = checked_inputs(prompts, seeds)
    check_call(pipe, call)
    log_cut_prompts(pipe, prompts, call)
    parts = []
    denoiser = denoiser_of(pipe)
    linears = [s.directions_of for s in discover(denoiser, "rank") if s.directions_of]
    with averaged(denoiser) as means, conditioned(denoiser, linears) as moments:
        for chunk in _chunks(len(prompts), batch_size):
            embeds = encode(pipe, [prompts[i] for i in chunk], call)
            noise = starting_noise(pipe, [seeds[i] for i in chunk], call)
            z0 = denoise(pipe, embeds, noise, call)
            parts.append(({k: v.cpu() for k, v in embeds.items()}, noise.cpu(), z0.cpu()))
    z0 = torch.cat([part[2] for part in parts])
    _refuse_not_finite("calibrate", z0, seeds, pipe)
    return Calibration(
        prompts=prompts,
        seeds=seeds,
        embeds={key: torch.cat([part[0][key] for part in parts]) for key in parts[0][0]},
        noise=torch.cat([part[1] for part in parts]),
        z0=z0,
        call=dict(call),
        fingerprint=fingerprint(pipe),
        means=means,
        moments=moments,
    )


def checked_inputs(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[list[str], list[int]]:
    """Prompts and the seeds of their noise as lists, once they are known to be usable."""
    prompts, seeds = list(prompts), list(seeds)
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise UserError(f"calibrate: prompt {i} is {prompt!r}, must be a text")
    if not prompts or len(prompts) != len(seeds):
        raise UserError(f"calibrate: {len(prompts)} prompts need as many seeds, got {len(seeds)}")
    for seed in seeds:
        if not hasattr(seed, "__index__") or not 0 <= seed < 2**63:
            raise UserError(f"calibrate: seed {seed!r} is not a whole number from 0 to 2^63 - 1")
    if len(set(seeds)) != len(seeds):
        raise UserError("calibrate: seeds must differ, or prompts would share their starting noise")
    return prompts, [int(seed) for seed in seeds]


@contextmanager
def averaged(denoiser: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside the context the denoiser's runs are averaged; on exit the dict holds the `means` of a
    `Calibration`."""
    structures, means = discover(denoiser), dict[str, Tensor]()
    written = modulation_linears(structures)
    read = {port.module for s in structures for port in s.consumers}
    linears = {name: denoiser.get_submodule(name) for name in sorted(written | read)}
    linears = {name: linear for name, linear in linears.items() if linear.bias is not None}
    sums: dict[str, Tensor | float] = dict.fromkeys(linears, 0.0)
    counts = dict.fromkeys(linears, 0)

    def add(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        rows = rows_of(layer, args[0].detach())
        sums[name] += rows.sum(0, dtype=torch.float64)
        counts[name] += len(rows)

    with watched(denoiser, linears, add):
        yield means
    for name, linear in linears.items():
        if counts[name]:
            mean = sums[name] / counts[name]
            if name in written:  # a linear of a mean is the mean of the linear
                mean = linear.weight.detach().double() @ mean + linear.bias.detach().double()
            means[name] = mean.float().cpu()


def rows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """What a linear, or a 1x1 convolution, reads: float32 (tokens, in)."""
    return (x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x).flatten(0, -2).float()


@contextmanager
def watched(denoiser: nn.Module, names: Iterable[str], watch: Callable[..., Any]) -> Iterator[None]:
    """Inside the context, call `watch(name, layer, args)` before each of the named layers runs."""
    handles = [
        denoiser.get_submodule(name).register_forward_pre_hook(partial(watch, name))
        for name in names
    ]
    try:
        with without_compiling():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _chunks(count: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def _refuse_not_finite(
    file: str, z0: Tensor, seeds: Sequence[int], pipe: DiffusionPipeline | None = None
) -> None:
    finite = z0.flatten(1).isfinite().all(1).tolist()
    bad = [seed for seed, fine in zip(seeds, finite, strict=True) if not fine]
    if bad:
        why = "" if pipe is None else f"; {why_not_finite(pipe)}"
        raise UserError(f"{file}: latents of seeds {bad[:5]} are not finite{why}")


def write(path: str | Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Write tensors and facts to one safetensors file, whole or not at all."""
    with atomic(path) as scratch:
        contiguous = {key: value.contiguous() for key, value in tensors.items()}
        save_file(contiguous, scratch, metadata={"ecodiff": json.dumps(info)})


def read(path: str | Path, without: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a file that `write` wrote; `without` those of a prefix.

    Raises `UserError` when the file is missing or not one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {})["ecodiff"])
            names = [n for n in file.keys() if not (without and n.startswith(without))]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}, info
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: missing, truncated or not written by ecodiff") from error


def popped(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take those out whose name begins with a prefix, under what comes after it."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}


def built(cls: type, path: str | Path, fields: dict[str, Any]) -> Any:
    """An object of the fields that were read of a file; `UserError` where they are of another."""
    try:
        return cls(**fields)
    except TypeError as error:
        raise UserError(f"{path}: is not a {cls.__name__.lower()} file") from error
