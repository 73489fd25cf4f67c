"""Reads what `ecodiff.generate` wrote: images and final latents, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ecodiff.models.identity import LATENTS, Origin, read_origin, same_model
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.pictures import read_picture

if TYPE_CHECKING:
    import pandas as pd


class Samples:
    """The pictures of one variant, in the order of their index, read when asked for.

    Attributes:
        index: int64 (n,), ascending: which prompts the pictures belong to.
        origin: what they were made of; prompts and seeds in the order of `index`.
        shape: of a picture, (height, width, 3); all have the same.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        """Opens shards, the folders that `generate` wrote.

        Raises:
            UserError: a file is missing, truncated or of an older ecodiff, two shards hold the
                same prompt, or they are of different models or calls.
        """
        found: list[tuple[int, Path, int, str, int]] = []
        origins: dict[Path, Origin] = {}
        for shard in map(Path, shards):
            index, origins[shard] = read_origin(shard)
            rows = zip(index, origins[shard].prompts, origins[shard].seeds, strict=True)
            found += [(i, shard, row, *what) for row, (i, *what) in enumerate(rows)]
        found.sort(key=lambda entry: entry[0])
        if not found:
            raise UserError(f"{_listed(shards)}: no pictures")
        self.shards = [*origins]
        self._where = [(shard, row) for _, shard, row, *_ in found]
        self.index = np.array([prompt for prompt, *_ in found], dtype=np.int64)
        twice = self.index[1:][np.diff(self.index) == 0]
        if twice.size:
            raise UserError(f"{_listed(shards)}: prompt {twice[0]} is there more than once")
        self.origin = self._same_origin(origins, found)
        missing = [path for path in self._paths(slice(None)) if not path.is_file()]
        if missing:
            raise UserError(f"images: {missing[0]} is missing ({len(missing)} in all)")
        self.latent = self._same_latents()
        self.shape = np.asarray(read_picture(self._paths(slice(0, 1))[0])).shape

    def __len__(self) -> int:
        return len(self.index)

    def __str__(self) -> str:
        return _listed(self.shards)

    def check_prompts(self, prompts: pd.DataFrame, table: str) -> None:
        """Raise `UserError` unless these are the pictures of all prompts of a table.

        Args:
            prompts: columns `index`, `prompt`, `seed`.
            table: its file, for the error.
        """
        theirs = zip(prompts["index"], prompts["prompt"], prompts["seed"], strict=True)
        self._check_rows({index: row for index, *row in theirs}, table)

    def check_dense(self, dense: Samples) -> None:
        """Raise `UserError` unless these can be compared with the dense model's pictures."""
        self._check_rows(dense._rows(), str(dense))
        odd = self.origin.odd_to(dense.origin)
        if odd:
            raise UserError(f"{self}: can't be compared with {dense}: {odd}")
        for mine, theirs, what in (
            (self.shape, dense.shape, "pictures"),
            (self.latent, dense.latent, "latents"),
        ):
            if mine != theirs:
                raise UserError(f"{self}: {what} are {mine}, those of {dense} are {theirs}")

    def images(self, rows: slice) -> np.ndarray:
        """The pictures of some rows: uint8 (n, height, width, 3).

        Raises `UserError` when one cannot be read or has another size than its fellows.
        """
        found = []
        for path in self._paths(rows):
            found.append(np.asarray(read_picture(path)))
            if found[-1].shape != self.shape:
                raise UserError(f"{path}: is {found[-1].shape}, its fellows are {self.shape}")
        return np.stack(found)

    def latents(self, rows: slice) -> Tensor:
        """The final latents of some rows: float32 (n, *latent).

        Raises `UserError` when one is not finite.
        """
        z0 = []
        for shard in dict.fromkeys(shard for shard, _ in self._where[rows]):
            wanted = [row for where, row in self._where[rows] if where == shard]
            first = min(wanted)
            block = _read(shard / LATENTS, slice(first, max(wanted) + 1))
            z0.append((shard, {row: block[row - first] for row in wanted}))
        found = dict(z0)
        latents = torch.stack([found[shard][row] for shard, row in self._where[rows]])
        finite = latents.flatten(1).isfinite().all(1).numpy()
        if not finite.all():
            bad = self.index[rows][~finite].tolist()[:5]
            raise UserError(f"{self}: latents of prompts {bad} are not finite; generate again")
        return latents

    def _rows(self) -> dict[int, list[Any]]:
        """Index -> prompt and seed."""
        rows = zip(self.index.tolist(), self.origin.prompts, self.origin.seeds, strict=True)
        return {index: row for index, *row in rows}

    def _check_rows(self, theirs: dict[int, list[Any]], other: str) -> None:
        mine = self._rows()
        for one, two, first, second in ((theirs, mine, other, self), (mine, theirs, self, other)):
            odd = sorted(one.keys() - two.keys())
            if odd:
                raise UserError(f"{second}: lacks prompts {odd[:5]}, which {first} has")
        odd = [index for index in mine if mine[index] != theirs[index]]
        if odd:
            raise UserError(
                f"{self}: prompt {odd[0]} is {mine[odd[0]]}, but {theirs[odd[0]]} in {other}"
            )

    def _same_origin(self, origins: dict[Path, Origin], found: list[Any]) -> Origin:
        """The one origin of all shards, with the rows of all."""
        first, *others = self.shards
        for shard in others:
            odd = origins[shard].odd_call(origins[first])
            if not same_model(origins[shard].model, origins[first].model):
                odd = "they are of different models"
            if odd:
                raise UserError(f"{shard}: does not belong to {first}: {odd}")
        prompts, seeds = ([entry[column] for entry in found] for column in (3, 4))
        return replace(origins[first], prompts=prompts, seeds=seeds)

    def _same_latents(self) -> tuple[int, ...]:
        """The shape of a prompt's latents, the same in all shards."""
        shapes = {
            shard: tuple(_read(shard / LATENTS, slice(0, 1)).shape[1:]) for shard in self.shards
        }
        first = shapes[self.shards[0]]
        odd = [shard for shard, shape in shapes.items() if shape != first]
        if odd:
            raise UserError(f"{odd[0]}: latents are {shapes[odd[0]]}, those of its fellows {first}")
        return first

    def _paths(self, rows: slice) -> list[Path]:
        where = zip(self.index[rows], self._where[rows], strict=True)
        return [shard / f"{index:05d}.png" for index, (shard, _) in where]


def _listed(shards: Sequence[Path]) -> str:
    """Shards in an error: the first, and how many more."""
    more = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
    return f"{shards[0]}{more}" if shards else "images"


def _read(path: Path, rows: slice) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_slice("z0")[rows]
    except (OSError, SafetensorError) as error:
        raise UserError(f"latents: {path} cannot be read: {error}") from error
