"""The dense model's own denoising trajectory on disk: what a pruned model learns to repeat.

For each call of the denoiser in the pipeline's loop, its arguments and its prediction are kept,
with both branches of classifier-free guidance, as the pipeline batches them. So no noise schedule,
no conditioning and no guidance is rebuilt here, and no second model is in memory while one learns.

A file holds one batch of prompts. What all steps share, such as embeddings, is stored once, so that
a prompt of SDXL at 1024 px and 50 steps takes about 20 MB in bfloat16.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import (
    TreeSpec,
    tree_flatten,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

from ecodiff.models.families import Call, size
from ecodiff.models.identity import same_denoiser
from ecodiff.models.pipelines import (
    check_dense,
    check_fingerprint,
    encode,
    encode_pictures,
    fingerprint,
    starting_noise,
)
from ecodiff.models.structures import denoiser_of
from ecodiff.runtime.artifacts import atomic
from ecodiff.runtime.code import code_hash
from ecodiff.runtime.errors import UserError, listed
from ecodiff.runtime.parts import Parts, link_or_copy
from ecodiff.runtime.pictures import read_picture
from ecodiff.runtime.state import unfinished
from ecodiff.trajectory.rollout import DenseStep, dense_steps

log = logging.getLogger(__name__)


def record(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    call: Call,
    batch: int,
    folder: Path,
    leader: DiffusionPipeline | None = None,
    pictures: Sequence[str] | None = None,
) -> None:
    """Record the dense model on prompts: a file of `folder` a batch.

    The folder is written whole or not at all; a recording that was stopped or killed goes on after
    its last whole batch.

    Args:
        pipe: the dense pipeline.
        prompts, seeds: captions, and the seeds of their starting noise.
        call: how the pipeline is called.
        batch: prompts a file, and an update of the model that learns from it.
        folder: where to write `00000.safetensors` and so on; what is there is replaced.
        leader: a pipeline pruned from it, at whose own latents the dense one is asked; None: at
            those of the dense one.
        pictures: files, one a prompt, at whose noised latents it is asked instead.

    Raises:
        UserError: the leader was pruned from another model, or pictures are unreadable.
    """
    if leader is not None:
        check_dense(leader, pipe)
    if pictures is not None:
        _check_readable(pictures)
    origin = {"fingerprint": fingerprint(pipe), "call": dict(call)}
    drawn = {"prompts": list(prompts), "seeds": [int(seed) for seed in seeds]}
    met = {"leader": leader and fingerprint(leader), "pictures": pictures and _files(pictures)}
    kind = {"code": code_hash("retrain.trajectory"), "batch": batch}
    kind |= {"dtype": str(pipe.dtype), "device": pipe.device.type}
    parts = Parts(unfinished(folder), {**kind, **origin, **drawn, **met})
    count = -(-len(prompts) // batch)
    for number in range(count):
        with parts.make(number) as part:
            if part is None:
                continue
            rows = slice(number * batch, (number + 1) * batch)
            with torch.inference_mode():
                embeds = encode(pipe, list(prompts[rows]), call)
                noise = starting_noise(pipe, list(seeds[rows]), call)
                z0 = None if pictures is None else _latents(pipe, pictures[rows], call)
                steps = dense_steps(pipe, embeds, noise, call, leader and denoiser_of(leader), z0)
            info = {**origin, **{key: values[rows] for key, values in drawn.items()}}
            _write(part / f"{number:05d}.safetensors", steps, info)
            log.info("trajectory: batch %s of %s", number + 1, count)
    with atomic(folder, folder=True) as scratch:
        for file in parts.files("*.safetensors"):
            link_or_copy(file, scratch / file.name)
    parts.discard()


def _files(paths: Sequence[str]) -> list[tuple[str, int, int]]:
    """Which files they are now: name, size and time of change."""
    found = [(path, Path(path).stat()) for path in paths]
    return [(path, file.st_size, file.st_mtime_ns) for path, file in found]


def _check_readable(pictures: Sequence[str]) -> None:
    """Before anything is drawn: UserError that counts the files that are no whole pictures."""
    errors, unreadable = [], []
    for path in pictures:
        try:
            read_picture(path)
        except UserError as error:
            errors.append(str(error))
            unreadable.append(Path(path).name)
    if errors:
        count = f"{len(errors)} of {len(pictures)} pictures cannot be read"
        raise UserError(f"{count}: {listed(unreadable, 5)}; the first one: {errors[0]}")


def _latents(pipe: DiffusionPipeline, pictures: Sequence[str], call: Call) -> Tensor:
    height, width = size(pipe, call)
    found = [np.asarray(read_picture(path, (width, height))) for path in pictures]
    return encode_pictures(pipe, np.stack(found))


@dataclass(frozen=True)
class Trajectory:
    """One recorded batch of prompts, read step by step.

    Attributes:
        path: its file.
        steps: how many calls of the denoiser it holds.
        prompts, seeds: its captions, and the seeds of their starting noise.
        call: how the pipeline was called.
        spec, leaves, places: the arguments of a call: their structure, those that are no tensors,
            and which tensor of the file each of the others is at each step.
    """

    path: Path
    steps: int
    prompts: list[str]
    seeds: list[int]
    call: Call
    spec: TreeSpec
    leaves: list[Any]
    places: dict[str, list[int]]

    def step(self, number: int, device: torch.device, dtype: torch.dtype) -> DenseStep:
        """Arguments and prediction of one call; floating-point tensors on a device in a dtype."""
        with safe_open(self.path, framework="pt") as file:
            leaves = list(self.leaves)
            for index, places in self.places.items():
                leaf = file.get_tensor(f"leaf.{index}.{places[number]}")
                leaves[int(index)] = leaf.to(device, dtype if leaf.is_floating_point() else None)
            prediction = file.get_slice("prediction")[number].to(device)
        args, kwargs = tree_unflatten(leaves, self.spec)
        return DenseStep(tuple(args), kwargs, prediction)


def read(folders: Sequence[Path], pipe: DiffusionPipeline, dense: str) -> list[Trajectory]:
    """All batches of some folders, in order.

    Args:
        folders: what `record` wrote.
        pipe: the model that is to learn from them, for messages.
        dense: the fingerprint of the dense model that it was pruned from.

    Raises:
        UserError: there is none, or one is damaged or of another model.
    """
    found = []
    for path in (file for folder in folders for file in sorted(folder.glob("*.safetensors"))):
        try:
            with safe_open(path, framework="pt") as file:
                info = json.loads(file.metadata()["ecodiff"])
                one = Trajectory(
                    path,
                    file.get_slice("prediction").get_shape()[0],
                    **{key: info[key] for key in ("prompts", "seeds", "call", "leaves")},
                    spec=treespec_loads(info["spec"]),
                    places=info["tensors"],
                )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: truncated, or no trajectory of ecodiff") from error
        check_fingerprint(str(path), info["fingerprint"], dense, pipe, same_denoiser)
        found.append(one)
    if not found:
        raise UserError(f"{', '.join(map(str, folders))}: holds no trajectory")
    return found


def _write(path: Path, steps: Sequence[DenseStep], info: dict[str, Any]) -> None:
    """One file: predictions (steps, n, ...), and each tensor among the arguments once for all steps
    that share it, `leaf.<argument>.<which>`."""
    flat = [tree_flatten((list(step.args), step.kwargs)) for step in steps]
    _, spec = flat[0]
    leaves, tensors = [], {}
    tensors["prediction"] = torch.stack([step.prediction for step in steps]).cpu().contiguous()
    places: dict[int, list[int]] = {}
    for index, column in enumerate(zip(*(found for found, _ in flat), strict=True)):
        if not isinstance(column[0], Tensor):
            leaves.append(column[0])
            continue
        leaves.append(None)
        different, places[index] = _unique(column)
        for place, one in enumerate(different):
            tensors[f"leaf.{index}.{place}"] = one.cpu().contiguous()
    text = {**info, "spec": treespec_dumps(spec), "leaves": leaves, "tensors": places}
    save_file(tensors, path, metadata={"ecodiff": json.dumps(text)})


def _unique(column: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The different ones of some tensors, and which of them each one is.

    Compared with the first and the last kept: embeddings are all the same, or take turns with those
    of the other branch of guidance; latents all differ.
    """
    kept: list[Tensor] = []
    places = []
    for one in column:
        near = {0, len(kept) - 2, len(kept) - 1} & set(range(len(kept)))
        place = next((n for n in sorted(near) if torch.equal(kept[n], one)), len(kept))
        if place == len(kept):
            kept.append(one)
        places.append(place)
    return kept, places
