from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import CALLS, tiny, tiny_sdxl

from ecodiff import prune
from ecodiff.generate import generate
from ecodiff.models.identity import read_origin
from ecodiff.models.pipelines import fingerprint
from ecodiff.models.structures import discover
from ecodiff.runtime.errors import UserError

generation = import_module("ecodiff.generate")  # the module, not its function


def prompts(first: int, count: int) -> pd.DataFrame:
    index = list(range(first, first + count))
    colours = ["red", "blue", "green", "white", "cyan"]
    return pd.DataFrame(
        {
            "index": index,
            "prompt": [f"a small {colours[i % 5]} ring on navy" for i in index],
            "seed": [100 + i for i in index],
            "image": None,
        }
    )


def pixels(folder: Path, index: int) -> np.ndarray:
    return np.asarray(Image.open(folder / f"{index:05d}.png")).astype(int)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_neither_the_batch_nor_the_shard_changes_a_picture(family: str, tmp_path: Path) -> None:
    pipe, whole, part = tiny(family), tmp_path / "whole", tmp_path / "part"
    generate(pipe, prompts(0, 5), CALLS[family], 3, whole)
    generate(pipe, prompts(2, 2), CALLS[family], 1, part)
    many, few = load_file(whole / "latents.safetensors"), load_file(part / "latents.safetensors")
    assert many["index"].tolist() == [0, 1, 2, 3, 4]
    assert few["index"].tolist() == [2, 3]
    torch.testing.assert_close(few["z0"], many["z0"][2:4], rtol=0, atol=1e-4)
    for index in (2, 3):
        assert np.abs(pixels(whole, index) - pixels(part, index)).max() <= 1


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_pictures_and_latents_are_the_pipelines_own(family: str, tmp_path: Path) -> None:
    pipe, rows = tiny(family), prompts(0, 1)
    generate(pipe, rows, CALLS[family], 1, tmp_path / "ours")
    noise = torch.Generator("cpu").manual_seed(100)
    theirs = pipe(rows["prompt"].tolist(), generator=noise, output_type="np", **CALLS[family])
    expected = (theirs.images[0] * 255).round()
    assert np.abs(pixels(tmp_path / "ours", 0) - expected).max() <= 1


def test_the_same_words_from_another_seed_give_another_picture(tmp_path: Path) -> None:
    rows = prompts(0, 2).assign(prompt="a small red ring on navy")
    generate(tiny_sdxl(), rows, CALLS["sdxl"], 2, tmp_path / "out")
    z0 = load_file(tmp_path / "out" / "latents.safetensors")["z0"]
    assert (z0[0] - z0[1]).abs().mean() > 0.1


def test_latents_that_are_not_finite_stop_the_job_and_leave_nothing(tmp_path: Path) -> None:
    pipe = tiny_sdxl()
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(UserError, match=r"prompts \[0, 1\] are not finite"):
        generate(pipe, prompts(0, 2), CALLS["sdxl"], 2, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_pictures_that_are_not_finite_name_their_prompts(tmp_path: Path) -> None:
    pipe = tiny_sdxl()
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(torch.nan)
    with pytest.raises(
        UserError, match=r"pictures of prompts \[4, 5\] are not finite; the model's own"
    ):
        generate(pipe, prompts(4, 2), CALLS["sdxl"], 2, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_index_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    rows = prompts(0, 3).assign(index=[0, 1, 1])
    with pytest.raises(UserError, match="index 1 is in the table twice"):
        generate(tiny_sdxl(), rows, CALLS["sdxl"], 2, tmp_path / "out")


def test_a_shard_says_what_it_was_made_of(tmp_path: Path) -> None:
    pipe, rows = tiny("flux"), prompts(3, 2)
    dense = fingerprint(pipe)
    prune(pipe, {s.name: torch.arange(s.units) % 2 == 0 for s in discover(pipe)})
    generate(pipe, rows, CALLS["flux"], 2, tmp_path / "out")
    index, origin = read_origin(tmp_path / "out")
    assert (index, origin.prompts, origin.seeds) == ([3, 4], [*rows["prompt"]], [103, 104])
    assert (origin.dense, origin.call) == (dense, CALLS["flux"])
    assert origin.model == fingerprint(pipe) != dense


class Killed(BaseException):
    """As a process ends that is killed: nothing catches it."""


def test_a_killed_shard_goes_on_after_its_last_whole_batch(tmp_path: Path, monkeypatch) -> None:
    pipe, rows, call = tiny("flux"), prompts(0, 5), CALLS["flux"]
    generate(pipe, rows, call, 2, tmp_path / "whole")
    drawn, decode = [], generation.decode

    def counted(pipe, z0, call):
        drawn.append(len(z0))
        if len(drawn) == 2:
            raise Killed
        return decode(pipe, z0, call)

    monkeypatch.setattr(generation, "decode", counted)
    with pytest.raises(Killed):
        generate(pipe, rows, call, 2, tmp_path / "shard")
    assert not (tmp_path / "shard").exists()
    generate(pipe, rows, call, 2, tmp_path / "shard")
    assert drawn == [2, 2, 2, 1]  # the second batch again, and the third; not the first
    names = [file.name for file in sorted((tmp_path / "whole").iterdir())]
    assert [file.name for file in sorted((tmp_path / "shard").iterdir())] == names
    for name in names:
        assert (tmp_path / "shard" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard", "whole"]


@pytest.mark.parametrize("change", ["call", "prompts", "batch"])
def test_parts_of_another_shard_are_not_taken(tmp_path: Path, monkeypatch, change: str) -> None:
    pipe, rows, call, batch = tiny("flux"), prompts(0, 4), dict(CALLS["flux"]), 2
    save_file = generation.save_file

    def killed_at_the_end(tensors, path, metadata=None):
        if metadata is not None:
            raise Killed
        save_file(tensors, path)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(generation, "save_file", killed_at_the_end)
        generate(pipe, rows, call, batch, tmp_path / "shard")
    if change == "call":
        call["num_inference_steps"] += 1
    elif change == "prompts":
        rows["seed"] += 1
    else:
        batch = 1
    drawn, decode = [], generation.decode
    monkeypatch.setattr(generation, "decode", lambda p, z, c: drawn.append(1) or decode(p, z, c))
    generate(pipe, rows, call, batch, tmp_path / "shard")
    assert len(drawn) == 4 // batch
