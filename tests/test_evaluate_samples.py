from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from gallery import write_shard
from PIL import Image

from ecodiff.evaluate.samples import Samples
from ecodiff.runtime.errors import UserError


def shard(folder: Path, index: list[int], side: int = 8, latent: int = 3, **origin: object) -> Path:
    images = np.stack([np.full((side, side, 3), i, dtype=np.uint8) for i in index])
    z0 = torch.stack([torch.full((2, latent), float(i)) for i in index])
    return write_shard(folder, index, images, z0, **origin)


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
    with pytest.raises(UserError, match=r"00000\.png: cannot be read"):
        Samples([folder]).images(slice(0, 1))


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        ({"model": "n::"}, "of different models"),
        ({"call": {"height": 64}}, "call's height was 64, the other one's None"),
    ],
)
def test_shards_that_were_not_made_together_are_refused(tmp_path: Path, odd, why: str) -> None:
    shards = [shard(tmp_path / "a", [0, 1]), shard(tmp_path / "b", [2], **odd)]
    with pytest.raises(UserError, match=f"b: does not belong to .*a: .*{why}"):
        Samples(shards)


def test_a_picture_of_another_size_than_its_fellows_is_named(tmp_path: Path) -> None:
    folder = shard(tmp_path / "a", [0, 1])
    Image.new("RGB", (9, 8)).save(folder / "00001.png")
    with pytest.raises(UserError, match=r"00001\.png: is \(8, 9, 3\), its fellows are \(8, 8, 3\)"):
        Samples([folder]).images(slice(0, 2))


def test_latents_of_another_shape_than_their_fellows_are_named(tmp_path: Path) -> None:
    shards = [shard(tmp_path / "a", [0]), shard(tmp_path / "b", [1], latent=4)]
    with pytest.raises(UserError, match=r"b: latents are \(2, 4\), those of its fellows \(2, 3\)"):
        Samples(shards)


def test_latents_that_are_not_finite_name_their_prompts(tmp_path: Path) -> None:
    images = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    z0 = torch.zeros(3, 2)
    z0[1, 0], z0[2, 1] = torch.nan, torch.inf
    samples = Samples([write_shard(tmp_path / "a", [5, 6, 7], images, z0)])
    assert samples.latents(slice(0, 1)).shape == (1, 2)
    with pytest.raises(UserError, match=r"latents of prompts \[6, 7\] are not finite"):
        samples.latents(slice(0, 3))


def test_pictures_belong_to_a_table_when_all_rows_agree(tmp_path: Path) -> None:
    samples = Samples([shard(tmp_path / "a", [0, 1, 2])])
    table = pd.DataFrame({"index": [0, 1, 2], "seed": [0, 1, 2]})
    table["prompt"] = [f"prompt {i}" for i in table["index"]]
    samples.check_prompts(table, "t.parquet")
    with pytest.raises(UserError, match=r"prompt 1 is .* but \['other', 1\] in t\.parquet"):
        samples.check_prompts(table.replace("prompt 1", "other"), "t.parquet")
    with pytest.raises(UserError, match=r"prompt 2 is .* but \['prompt 2', 9\] in t\.parquet"):
        samples.check_prompts(table.assign(seed=[0, 1, 9]), "t.parquet")
    with pytest.raises(UserError, match=r"t\.parquet: lacks prompts \[2\], which .*a has"):
        samples.check_prompts(table[:2], "t.parquet")
    with pytest.raises(UserError, match=r"a: lacks prompts \[3\], which t\.parquet has"):
        more = pd.DataFrame({"index": [3], "seed": [3], "prompt": ["prompt 3"]})
        samples.check_prompts(pd.concat([table, more]), "t.parquet")


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        ({"model": "p::", "dense": "other::"}, "pruned from another dense model"),
        ({"model": "p:euler:"}, "their scheduler was another one"),
        ({"call": {"steps": 2}}, "call's steps was 2, the other one's None"),
        ({"seeds": [0, 9]}, r"prompt 1 is \['prompt 1', 9\], but \['prompt 1', 1\] in"),
        ({"side": 9}, r"pictures are \(9, 9, 3\), those of .*dense are \(8, 8, 3\)"),
        ({"latent": 4}, r"latents are \(2, 4\)"),
    ],
)
def test_a_variant_must_be_comparable_with_the_dense_model(tmp_path: Path, odd, why: str) -> None:
    dense = Samples([shard(tmp_path / "dense", [0, 1])])
    fine = {"model": "p::", "dense": "m::"}
    Samples([shard(tmp_path / "fine", [0, 1], **fine)]).check_dense(dense)
    with pytest.raises(UserError, match=rf"odd.*{why}"):
        Samples([shard(tmp_path / "odd", [0, 1], **{**fine, **odd})]).check_dense(dense)


def test_pictures_of_a_pruned_model_are_not_the_dense_ones(tmp_path: Path) -> None:
    pruned = Samples([shard(tmp_path / "a", [0], model="p::")])
    with pytest.raises(UserError, match="of a pruned model"):
        pruned.check_dense(pruned)
