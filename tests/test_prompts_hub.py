"""Prompts by the library `datasets`, from folders that the test makes; nothing is downloaded."""

from __future__ import annotations

import io
import logging

import pytest
from PIL import Image

from ecodiff.config.sections import PromptSet
from ecodiff.prompts import make_prompts
from ecodiff.runtime.errors import UserError

datasets = pytest.importorskip("datasets")

CAPTIONS = ["a dog", " ", "a cat ", "a bird"]


def picture(level: int, kind: str) -> dict[str, bytes]:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), (level, 0, 0)).save(out, kind)
    return {"bytes": out.getvalue()}


@pytest.fixture
def rows():
    kinds = ("PNG", "PNG", "JPEG", "PNG")
    pictures = [picture(40 * place, kind) for place, kind in enumerate(kinds)]
    several = [[caption, "another"] for caption in CAPTIONS]
    columns = {"prompt": CAPTIONS, "captions": several, "image": pictures, "number": [1, 2, 3, 4]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=["parquet", "arrow"])
def folder(request, rows, tmp_path):
    place = tmp_path / "set"
    if request.param == "arrow":
        datasets.DatasetDict({"train": rows}).save_to_disk(place)
    else:
        (place / "data").mkdir(parents=True)
        rows.to_parquet(place / "data/train-00000-of-00001.parquet")
    return place


def made(place, tmp_path, **settings):
    chosen = PromptSet(source="datasets", path=str(place), **{"count": 2, "seed": 5, **settings})
    return make_prompts(chosen, tmp_path / "pictures")


def test_the_first_captions_that_are_not_blank(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO, "ecodiff")
    table = made(folder, tmp_path)
    assert [*table["prompt"]] == ["a dog", "a cat"]
    assert [*table["seed"]] == [5, 6] and table["image"].isna().all()
    assert not (tmp_path / "pictures").exists()
    assert caplog.messages[0].endswith("blank captions left out: 1")


def test_pictures_are_written_as_they_were_stored(folder, tmp_path):
    table = made(folder, tmp_path, image_column="image")
    places = [tmp_path / "pictures" / name for name in ("00000.png", "00001.jpeg")]
    assert [*table["image"]] == [*map(str, places)]
    assert places[1].read_bytes() == picture(80, "JPEG")["bytes"]


def test_of_several_captions_the_first_counts(folder, tmp_path):
    assert [*made(folder, tmp_path, column="captions")["prompt"]] == ["a dog", "another"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"column": "text"},
            r"prompts\.column: .* has no column 'text'; there are 'prompt', 'capt",
        ),
        ({"image_column": "no"}, r"prompts\.image_column: .* has no column 'no'"),
        ({"image_column": "prompt"}, "prompt of .* holds no pictures"),
        ({"column": "number"}, "row 0: 1 is no text"),
        ({"split": "test"}, r"prompts\.path: .*"),
        ({"count": 4}, r"prompts\.count: 4 wanted, but .* has 3 \(blank captions left out: 1\)"),
    ],
)
def test_what_is_not_there_is_named(folder, tmp_path, settings, says):
    with pytest.raises(UserError, match=says) as error:
        made(folder, tmp_path, **settings)
    assert len(str(error.value).splitlines()) == 1


def test_a_damaged_picture_is_named(rows, tmp_path):
    columns = {"prompt": ["a dog", "a cat"], "image": [picture(1, "PNG"), {"bytes": b"no"}]}
    broken = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    broken.save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match="row 1: image is no picture"):
        made(tmp_path / "set", tmp_path, image_column="image")
    assert not (tmp_path / "pictures").exists()


def test_a_set_of_the_hub_that_is_not_here_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"prompts\.path: nobody/nothing: ") as error:
        made("nobody/nothing", tmp_path)
    assert len(str(error.value).splitlines()) == 1
