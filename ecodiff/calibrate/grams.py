"""Second moments of what consumers read in the dense model, within the memory that there is.

All those of FLUX.1 take 60 GB beside 24 GB of weights, so consumers are taken in parts, for each of
which the dense model runs again; whoever needs one consumer's moments reads that one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import Tensor, nn

from ecodiff.calibrate import Calibration, built, popped, read, rows_of, watched, write
from ecodiff.models.calls import why_not_finite
from ecodiff.models.families import Call, runs_per_step
from ecodiff.models.pipelines import check_fingerprint, fingerprint
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.models.units import Structure
from ecodiff.runtime.artifacts import atomic
from ecodiff.runtime.code import code_hash
from ecodiff.runtime.devices import free_memory
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.parts import Parts, link_or_copy
from ecodiff.runtime.state import unfinished

SHARE = 0.8  # of free memory; the rest is for what passes through the model
PRECISE = 8e9  # bytes up to which the sums of a model are float64
FILE = "grams.safetensors"


@dataclass
class Grams:
    """Second moments of what consumers read in the dense model; linear name -> value.

    Attributes:
        gram: X^T X, (in, in), over all tokens, prompts, guidance branches and denoising steps; of
            stored ones, each is read when it is asked for.
        total: the sum of X over the same, (in,).
        count: how many rows X has; steps may be weighted.
        fingerprint, call, prompts, seeds, means: of the calibration that they were gathered on.
        file: what errors call them.
    """

    gram: Mapping[str, Tensor]
    total: dict[str, Tensor]
    count: dict[str, float]
    fingerprint: str
    call: Call = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    means: dict[str, Tensor] = field(default_factory=dict)
    file: str = "grams"

    def check(self, pipe: DiffusionPipeline) -> None:
        """Raise `UserError` when these were gathered from another model than `pipe`."""
        check_fingerprint(self.file, self.fingerprint, fingerprint(pipe), pipe)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {f"gram.{name}": value for name, value in self.gram.items()}
        tensors |= {f"total.{name}": value for name, value in self.total.items()}
        tensors |= {f"means.{name}": value for name, value in self.means.items()}
        keys = ("count", "fingerprint", "call", "prompts", "seeds")
        write(path, tensors, {key: getattr(self, key) for key in keys})

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `store_grams` wrote, but for the matrices. Raises `UserError` when the folder
        is missing or not one."""
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder}: missing, or not written by `ecodiff grams`")
        parts = [_small(cls, file) for file in files]
        homes = {name: file for part, file in zip(parts, files, strict=True) for name in part.total}
        total = {name: value for part in parts for name, value in part.total.items()}
        count = {name: value for part in parts for name, value in part.count.items()}
        return replace(parts[0], gram=_Stored(homes), total=total, count=count, file=str(folder))


def _small(cls: type[Grams], file: Path) -> Grams:
    """What a file holds of a part of the consumers, but for their matrices."""
    tensors, info = read(file, without="gram.")
    small = {part: popped(tensors, f"{part}.") for part in ("total", "means")}
    return built(cls, file, {"gram": {}, **tensors, **small, **info})


class _Stored(Mapping[str, Tensor]):
    """Matrices that lie in files and are read one at a time: linear name -> (in, in)."""

    def __init__(self, homes: Mapping[str, Path]) -> None:
        self.homes = homes

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.homes[name], framework="pt") as file:
            return file.get_tensor(f"gram.{name}")

    def __contains__(self, name: object) -> bool:
        return name in self.homes  # a mapping's own looks by reading

    def __iter__(self) -> Iterator[str]:
        return iter(self.homes)

    def __len__(self) -> int:
        return len(self.homes)


def gather_grams(
    pipe: DiffusionPipeline,
    structures: Iterable[Structure],
    calibration: Calibration,
    batch_size: int,
    weight: Callable[[int, int], float] = lambda step, steps: 1.0,
) -> Grams:
    """Run the dense model once more and gather the moments of each consumer's input.

    Products are float32, sums float64 unless those of the whole model would take more than 8 GB, on
    the model's device, all at once; see `in_parts`. `weight` says how much a step counts: (which
    one, of how many) -> its factor. Raises `UserError` when the calibration is of another model, or
    activations are not finite.
    """
    calibration = calibration.for_dense(pipe)
    denoiser = denoiser_of(pipe)
    sizes = _sizes(denoiser, structures)
    names = list(sizes)
    kind = {"dtype": _dtype(denoiser), "device": denoiser.device}
    grams = Grams(
        gram={name: torch.zeros(size, size, **kind) for name, size in sizes.items()},
        total={name: torch.zeros(size, **kind) for name, size in sizes.items()},
        count=dict.fromkeys(names, 0),
        fingerprint=calibration.fingerprint,
        call=calibration.call,
        prompts=calibration.prompts,
        seeds=calibration.seeds,
        means=calibration.means,
    )

    calls, runs = dict.fromkeys(names, 0), runs_per_step(pipe, calibration.embeds)

    def add(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        rows, steps = rows_of(layer, args[0]), len(pipe.scheduler.timesteps)
        factor = weight(calls[name] // runs % steps, steps)
        calls[name] += 1
        grams.gram[name].add_(rows.T @ rows, alpha=float(factor))
        grams.total[name] += factor * rows.sum(0)
        grams.count[name] += factor * len(rows)

    with watched(denoiser, names, add):
        calibration.drawn_by(pipe, batch_size)
    bad = [name for name, gram in grams.gram.items() if not gram.isfinite().all()]
    if bad:
        raise UserError(f"grams: inputs of {bad[0]} are not finite; {why_not_finite(pipe)}")
    return grams


def in_parts(
    pipe: DiffusionPipeline, structures: Sequence[Structure], memory_mb: int | None = None
) -> list[list[Structure]]:
    """Split structures so that the moments of each part's consumers fit into memory.

    Structures that share a consumer stay together. A consumer that is too large by itself is a
    part of its own.

    Args:
        pipe: the dense pipeline, on the device that will hold the moments.
        structures: of its denoiser, in order.
        memory_mb: what the moments of a part may take, in 10^6 bytes; None: 80 % of what is free.
    """
    denoiser = denoiser_of(pipe)
    limit = memory_mb * 1e6 if memory_mb else SHARE * free_memory(denoiser.device)
    width = _dtype(denoiser).itemsize
    parts: list[list[Structure]] = []
    held: dict[str, int] = {}  # consumer -> its part
    filled = 0.0
    for structure in structures:
        sizes = _sizes(denoiser, [structure])
        shared = [held[name] for name in sizes if name in held]
        new = sum(width * size**2 for name, size in sizes.items() if name not in held)
        if not parts or (not shared and filled + new > limit):
            parts.append([])
            filled = 0.0
        part = shared[0] if shared else len(parts) - 1
        parts[part].append(structure)
        held |= {name: held.get(name, part) for name in sizes}
        filled += new
    return parts


def store_grams(
    pipe: DiffusionPipeline,
    calibration: Calibration,
    batch_size: int,
    folder: Path,
    memory_mb: int | None = None,
) -> None:
    """Gather the moments of all consumers, part by part, into a folder that `Grams.load` reads.

    A job that was stopped or killed goes on after its last whole part. The folder is written whole
    or not at all.

    Args:
        pipe: the dense pipeline.
        calibration: what `calibrate` recorded of it.
        batch_size: prompts that run together.
        folder: where to write.
        memory_mb: see `in_parts`.

    Raises:
        UserError: see `gather_grams`.
    """
    groups = in_parts(pipe, discover(denoiser_of(pipe)), memory_mb)
    names = [[structure.name for structure in group] for group in groups]
    kind = {"code": code_hash("calibrate"), "batch": batch_size, "groups": names}
    kind |= {key: getattr(calibration, key) for key in ("fingerprint", "call", "prompts", "seeds")}
    kind |= {"dtype": str(pipe.dtype), "device": pipe.device.type}
    parts = Parts(unfinished(folder), kind)
    for number, group in enumerate(groups):
        with parts.make(number) as part:
            if part is not None:
                gather_grams(pipe, group, calibration, batch_size).save(part / FILE)
    with atomic(folder, folder=True) as scratch:
        for number, file in enumerate(parts.files(FILE)):
            link_or_copy(file, scratch / f"{number:05d}.safetensors")
    parts.discard()


def _sizes(denoiser: nn.Module, structures: Iterable[Structure]) -> dict[str, int]:
    """The consumers of structures -> how many columns they read."""
    names = dict.fromkeys(port.module for s in structures for port in s.consumers)
    return {name: denoiser.get_submodule(name).weight.shape[1] for name in names}


def _dtype(denoiser: nn.Module) -> torch.dtype:
    """Of the sums: one for the whole model, whatever part of it is gathered."""
    squares = sum(size**2 for size in _sizes(denoiser, discover(denoiser)).values())
    return torch.float32 if 8 * squares > PRECISE else torch.float64
