"""Sheets of pictures: those that the model of that step draws."""

import numpy as np
import torch
from PIL import Image
from test_retrain import PROMPTS, half_pruned
from tiny import CALLS, tiny

from ecodiff.config.sections import RetrainSettings
from ecodiff.models.pipelines import decode, denoise, encode, starting_noise
from ecodiff.retrain.train import retrain
from ecodiff.retrain.trajectory import record

FEW = RetrainSettings(kind="full", lr=1e-3, steps=2, batch=2, pictures=2)


def drawn(pipe):
    """What the pipeline draws of the held-out prompts, side by side."""
    call = CALLS["flux"]
    with torch.inference_mode():
        embeds, noise = encode(pipe, PROMPTS[:2], call), starting_noise(pipe, [1, 2], call)
        return np.concatenate([*decode(pipe, denoise(pipe, embeds, noise, call), call)], axis=1)


def sheet(folder, step):
    return np.asarray(Image.open(folder / f"model.pictures/{step:06d}.png"))


def test_held_out_prompts_are_drawn_from_the_start_to_the_end(tmp_path):
    (tmp_path / "data").mkdir()
    record(tiny("flux"), PROMPTS, [1, 2, 3, 4], CALLS["flux"], 2, tmp_path / "data")
    pipe = half_pruned("flux")
    before = drawn(pipe)
    history = retrain(pipe, [tmp_path / "data"], FEW, tmp_path / ".model.unfinished").history
    assert np.array_equal(sheet(tmp_path, 0), before)
    best = int(history["held_out"].idxmin()) + 1
    assert np.array_equal(sheet(tmp_path, best), drawn(pipe))
    assert not np.array_equal(sheet(tmp_path, best), before)
    assert sorted(path.name for path in (tmp_path / "model.pictures").glob("*")) == [
        "000000.png",
        "000001.png",
        "000002.png",
    ]


def test_none_are_drawn_where_none_are_asked_for(tmp_path):
    (tmp_path / "data").mkdir()
    record(tiny("flux"), PROMPTS, [1, 2, 3, 4], CALLS["flux"], 2, tmp_path / "data")
    none = FEW.model_copy(update={"pictures": 0})
    retrain(half_pruned("flux"), [tmp_path / "data"], none, tmp_path / ".model.unfinished")
    assert not (tmp_path / "model.pictures").exists()
