"""What is seen of a shard of pictures, each by itself: small files that metrics are reduced from.

Imports no diffusers: a job starts in the time of torch, torchmetrics and open_clip.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from ecodiff.config.sections import SEEN_BY, EvaluateSettings
from ecodiff.evaluate.distances import Rows
from ecodiff.evaluate.features import Networks
from ecodiff.evaluate.samples import Samples
from ecodiff.models.identity import Origin
from ecodiff.runtime.artifacts import atomic
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.pictures import read_picture
from ecodiff.toys import checker, world


def see_real(
    prompts: pd.DataFrame, size: tuple[int, int], settings: EvaluateSettings, device: str = "cpu"
) -> dict[str, Tensor]:
    """What the real images of some prompts look like, which FID, KID and CMMD compare with.

    Args:
        prompts: columns `index` (int) and `image` (path).
        size: (width, height) that images are cut to around their centres.
        settings: the `evaluate` section of the config.
        device: where the feature networks run.

    Returns:
        index: int64 (n,), and what `Networks` makes of the images.

    Raises:
        UserError: a prompt has no image, or an image or a network is missing.
    """
    paths, networks = prompts["image"], Networks(settings, device)
    if paths.isna().any():
        raise UserError(f"prompts: prompt {prompts['index'][paths.isna()].iloc[0]} has no image")
    parts = [
        networks(np.stack([np.asarray(read_picture(path, size)) for path in paths[rows]]))
        for rows in batches(len(paths), settings.batch_size)
    ]
    return {"index": torch.tensor(prompts["index"].tolist()), **_joined(parts)}


def see(
    samples: Samples, dense: Samples, settings: EvaluateSettings, device: str = "cpu"
) -> dict[str, Tensor]:
    """What is seen of a variant's pictures beside the dense model's of the same prompts.

    Returns:
        index: int64 (n,). What `Networks` makes of the pictures. And of each picture, float64 (n,):
        clip_score: cosine to its caption. ssim, squared_error: to the dense model's picture; the
        latter is a mean over levels from 0 to 1. latent_error: mean((z0' - z0)^2) over its latents
        z0' and the dense model's z0. dense_mean, dense_square: the means of z0 and of its squares.
        objects: how many a ShapeWorld caption names, 0 of other captions. shown: 1 where the
        ShapeWorld checker finds what the caption says, else 0.

    Raises:
        UserError: the pictures can't be compared, see `Samples.check_dense`; one is missing or
            damaged, a latent is not finite, or a network is missing.
    """
    samples.check_dense(dense)
    networks, captions = Networks(settings, device), samples.origin.prompts
    parts = []
    for rows in batches(len(samples), settings.batch_size):
        images, theirs = samples.images(rows), dense.images(rows)
        z0, dense_z0 = (of.latents(rows).double().flatten(1) for of in (samples, dense))
        seen, texts = networks(images), networks.clip.texts(captions[rows])
        each = {
            "clip_score": F.cosine_similarity(seen["embeddings"], texts),
            "ssim": [_ssim(*pair) for pair in zip(images, theirs, strict=True)],
            "squared_error": [_squared_error(*pair) for pair in zip(images, theirs, strict=True)],
            "latent_error": (z0 - dense_z0).square().mean(1),
            "dense_mean": dense_z0.mean(1),
            "dense_square": dense_z0.square().mean(1),
            "objects": [_objects(caption) for caption in captions[rows]],
            "shown": [_shown(*one) for one in zip(images, captions[rows], strict=True)],
        }
        numbers = {k: torch.as_tensor(value, dtype=torch.float64) for k, value in each.items()}
        parts.append(seen | numbers)
    return {"index": torch.from_numpy(samples.index), **_joined(parts)}


def batches(count: int, size: int) -> Iterator[slice]:
    """Consecutive rows, `size` of them at a time."""
    return (slice(start, start + size) for start in range(0, count, size))


def write_seen(
    path: str | Path,
    seen: dict[str, Tensor],
    settings: EvaluateSettings,
    size: tuple[int, int],
    origin: Origin | None = None,
) -> None:
    """Write what `see` or `see_real` returned, with what it was seen by, of pictures of which
    size (width, height), made of what."""
    about = {
        "settings": settings.model_dump(mode="json", include=set(SEEN_BY)),
        "size": list(size),
        "origin": None if origin is None else [origin.model, origin.dense, origin.call],
    }
    with atomic(path) as scratch:
        whole = {key: value.contiguous() for key, value in seen.items()}
        save_file(whole, scratch, metadata={"ecodiff": json.dumps(about)})


@dataclass(frozen=True)
class Seen:
    """The shards of a set of pictures, in the order of their prompts, read where they lie.

    Attributes:
        files: as `write_seen` wrote them.
        about: what was written beside each.
        parts: their tensors, on disk until they are read.
    """

    files: list[Path]
    about: list[dict[str, Any]]
    parts: list[dict[str, Tensor]]

    @classmethod
    def read(cls, files: Sequence[Path]) -> Seen:
        """Opens shards. Raises `UserError` when one is missing or damaged, or two hold one prompt,
        were seen by other networks, or in other sizes, or are of other models or calls."""
        shards = sorted(map(_open, files), key=lambda one: int(one[2]["index"][0]))
        found = cls(*map(list, zip(*shards, strict=True)))
        for file, about in zip(found.files, found.about, strict=True):
            found.check(about["settings"], about["size"], f"{file}: does not belong to ")
            if about["origin"] != found.about[0]["origin"]:
                raise UserError(
                    f"{file}: does not belong to {found.files[0]}: another model or call"
                )
        index = found.column("index")
        twice = index[1:][index[1:] <= index[:-1]]
        if len(twice):
            raise UserError(f"{found}: prompt {int(twice[0])} is there more than once")
        return found

    def __len__(self) -> int:
        return sum(len(part["index"]) for part in self.parts)

    def __str__(self) -> str:
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0]}{more}"

    def check(self, settings: dict[str, Any], size: Sequence[int], what: str) -> None:
        """Raise `UserError` unless these were seen by the same networks in the same size."""
        mine = self.about[0]
        odd = [key for key in SEEN_BY if settings[key] != mine["settings"][key]]
        if odd:
            raise UserError(
                f"{what}{self}: {odd[0]} is {settings[odd[0]]} and {mine['settings'][odd[0]]}"
            )
        if list(size) != mine["size"]:
            raise UserError(f"{what}{self}: pictures of {list(size)} and {mine['size']} pixels")

    def column(self, name: str) -> Tensor:
        """A value of each picture: (n,)."""
        return torch.cat([part[name] for part in self.parts])

    def rows(self, name: str, device: str = "cpu") -> Rows:
        """Features of all pictures; CLIP's embeddings where there are none of that name."""
        return Rows([part.get(name, part["embeddings"]) for part in self.parts], device)


def _open(path: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["ecodiff"])
            # Tensors lie in the mapped file; what isn't read takes no memory.
            return path, about, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _ssim(image: np.ndarray, dense: np.ndarray) -> float:
    """SSIM by torchmetrics of two uint8 pictures (height, width, 3).

    One pair at a time, because it takes 750 bytes a pixel. In float64 it differs by less than
    1e-5, and torch takes ten times as long.
    """
    pair = [torch.from_numpy(one).permute(2, 0, 1)[None].float() / 255 for one in (image, dense)]
    return structural_similarity_index_measure(*pair, data_range=1.0).item()


def _squared_error(image: np.ndarray, dense: np.ndarray) -> float:
    """The mean squared difference of pictures of levels 0 to 1."""
    return float(np.square(image.astype(np.int32) - dense).mean() / 255**2)


def _objects(caption: str) -> int:
    try:
        return len(world.parse_caption(caption).things)
    except ValueError:
        return 0


def _shown(image: np.ndarray, caption: str) -> int:
    return int(_objects(caption) > 0 and checker.meets(image, caption))
