"""Reads what `ecodiff.generate` wrote: images and final latents, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ecodiff.runtime.errors import UserError
from ecodiff.runtime.pictures import read_picture


class Samples:
    """The pictures of one variant, in the order of their index, read when asked for.

    Attributes:
        index: int64 (n,), ascending: which prompts the pictures belong to.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        """Opens shards, the folders that `generate` wrote.

        Raises:
            UserError: a file is missing or truncated, or two shards hold the same prompt.
        """
        found: list[tuple[int, Path, int]] = []
        for shard in map(Path, shards):
            index = _read(shard / "latents.safetensors", "index").tolist()
            found += [(prompt, shard, row) for row, prompt in enumerate(index)]
        found.sort(key=lambda entry: entry[0])
        self._where = [(shard, row) for _, shard, row in found]
        self.index = np.array([prompt for prompt, _, _ in found], dtype=np.int64)
        twice = self.index[1:][np.diff(self.index) == 0]
        if twice.size:
            raise UserError(f"images: prompt {twice[0]} is in more than one shard")
        missing = [path for path in self._paths(slice(None)) if not path.is_file()]
        if missing:
            raise UserError(f"images: {missing[0]} is missing ({len(missing)} in all)")

    def __len__(self) -> int:
        return len(self.index)

    def images(self, rows: slice) -> np.ndarray:
        """The pictures of some rows: uint8 (n, height, width, 3)."""
        return np.stack([np.asarray(read_picture(path)) for path in self._paths(rows)])

    def latents(self, rows: slice) -> Tensor:
        """The final latents of some rows: float32 (n, *latent)."""
        z0 = []
        for shard in dict.fromkeys(shard for shard, _ in self._where[rows]):
            wanted = [row for where, row in self._where[rows] if where == shard]
            first = min(wanted)
            block = _read(shard / "latents.safetensors", "z0", slice(first, max(wanted) + 1))
            z0.append((shard, {row: block[row - first] for row in wanted}))
        found = dict(z0)
        return torch.stack([found[shard][row] for shard, row in self._where[rows]])

    def _paths(self, rows: slice) -> list[Path]:
        where = zip(self.index[rows], self._where[rows], strict=True)
        return [shard / f"{index:05d}.png" for index, (shard, _) in where]


def _read(path: Path, name: str, rows: slice = slice(None)) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_slice(name)[rows]
    except (OSError, SafetensorError) as error:
        raise UserError(f"latents: {path} cannot be read: {error}") from error
