from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gallery import write_shard
from PIL import Image

from ecodiff.evaluate.samples import Samples, read_image
from ecodiff.runtime.errors import UserError


def shard(folder: Path, index: list[int]) -> Path:
    images = np.stack([np.full((8, 8, 3), i, dtype=np.uint8) for i in index])
    z0 = torch.stack([torch.full((2, 3), float(i)) for i in index])
    return write_shard(folder, index, images, z0)


def test_rows_follow_the_index_whatever_the_order_of_shards(tmp_path: Path) -> None:
    samples = Samples([shard(tmp_path / "b", [4, 3]), shard(tmp_path / "a", [0, 2, 1])])
    assert samples.index.tolist() == [0, 1, 2, 3, 4]
    rows = slice(1, 5)  # across the shards
    assert samples.images(rows)[:, 0, 0, 0].tolist() == [1, 2, 3, 4]
    assert samples.latents(rows)[:, 0, 0].tolist() == [1, 2, 3, 4]


def test_a_prompt_in_two_shards_is_refused(tmp_path: Path) -> None:
    shards = [shard(tmp_path / "a", [0, 1]), shard(tmp_path / "b", [1, 2])]
    with pytest.raises(UserError, match="prompt 1 is there more than once"):
        Samples(shards)


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    folder = shard(tmp_path / "a", [0, 1])
    (folder / "00001.png").unlink()
    with pytest.raises(UserError, match=r"00001.png is missing \(1 in all\)"):
        Samples([folder])


def test_truncated_latents_are_named(tmp_path: Path) -> None:
    folder = shard(tmp_path / "a", [0, 1])
    path = folder / "latents.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"latents.safetensors cannot be read"):
        Samples([folder])


def test_a_truncated_picture_is_named(tmp_path: Path) -> None:
    folder = shard(tmp_path / "a", [0])
    path = folder / "00000.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"00000\.png cannot be read"):
        Samples([folder]).images(slice(0, 1))


def test_a_cut_keeps_the_aspect(tmp_path: Path) -> None:
    tall = np.zeros((200, 100, 3), dtype=np.uint8)
    tall[50:150] = 255  # the central square
    Image.fromarray(tall).save(tmp_path / "tall.png")
    cut = np.asarray(read_image(tmp_path / "tall.png", (32, 32)))
    assert cut.shape == (32, 32, 3)
    assert cut[2:-2].min() >= 254
