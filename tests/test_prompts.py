import json

import numpy as np
import pandas as pd
import pytest
from imports import loaded_by
from PIL import Image

from ecodiff.config.sections import PromptSet
from ecodiff.prompts import make_prompts, read_prompts, write_prompts
from ecodiff.runtime.errors import UserError
from ecodiff.toys import checker, world


def made(tmp_path, **settings):
    return make_prompts(PromptSet(**settings), tmp_path / "pictures")


def test_seeds_differ_a_prompt_and_start_at_the_sets_seed(tmp_path):
    table = made(tmp_path, source="shapeworld", count=3, seed=40)
    assert table["seed"].tolist() == [40, 41, 42]
    assert table["index"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_shapeworld_captions_are_of_the_split(tmp_path, split):
    table = made(tmp_path, source="shapeworld", count=20, split=split)
    assert {world.is_held_out(caption) for caption in table["prompt"]} == {split == "held-out"}


def test_shapeworld_pictures_show_their_captions(tmp_path):
    table = made(tmp_path, source="shapeworld", count=10, split="held-out")
    images = [np.asarray(Image.open(path)) for path in table["image"]]
    assert checker.scene_accuracy(images, table["prompt"].tolist()) == 1


def test_shapeworld_is_the_same_every_time(tmp_path):
    first, again = (made(tmp_path, source="shapeworld", count=5, seed=3) for _ in range(2))
    other = made(tmp_path, source="shapeworld", count=5, seed=4)
    assert first.equals(again)
    assert not first["prompt"].equals(other["prompt"])


def test_a_text_file_holds_a_prompt_a_line(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n  a dog \na cow\n")
    table = made(tmp_path, source="file", path=str(tmp_path / "p.txt"), count=2)
    assert table["prompt"].tolist() == ["a cat", "a dog"]
    assert table["image"].isna().all()


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_are_read_by_column(tmp_path, kind):
    path = tmp_path / f"p.{kind}"
    table = pd.DataFrame({"text": ["a, b", "c"], "prompt": ["no", "no"]})
    table.to_csv(path, index=False) if kind == "csv" else table.to_parquet(path)
    read = made(tmp_path, source="file", path=str(path), column="text", count=2)
    assert read["prompt"].tolist() == ["a, b", "c"]


def test_gcc_is_read_in_order(tmp_path):
    (tmp_path / "gcc.tsv").write_text("one\thttp://a\ntwo \thttp://b\nthree\thttp://c\n")
    table = made(tmp_path, source="gcc", path=str(tmp_path / "gcc.tsv"), count=2)
    assert table["prompt"].tolist() == ["one", "two"]


def coco(tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(30)]
    captions = [
        {"id": 100 - 3 * i - n, "image_id": i, "caption": f"{i} says {n} "}
        for i in range(30)
        for n in range(3)
    ]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": captions}))
    return {"source": "coco", "path": str(path), "images": "val"}


def test_coco_gives_one_caption_an_image_the_first(tmp_path):
    table = made(tmp_path, **coco(tmp_path), count=30)
    assert sorted(table["image"]) == sorted(f"val/{i}.jpg" for i in range(30))
    numbers = table["image"].str.extract(r"(\d+)\.jpg")[0]
    assert (table["prompt"] == numbers + " says 2").all()


def test_coco_is_drawn_by_seed(tmp_path):
    draws = [made(tmp_path, **coco(tmp_path), count=5, seed=seed) for seed in (1, 1, 2)]
    assert draws[0].equals(draws[1])
    assert draws[0]["image"].tolist() != draws[2]["image"].tolist()
    assert draws[0]["image"].tolist() != [f"val/{i}.jpg" for i in range(5)]


@pytest.mark.parametrize(
    "text",
    [
        "image_name| comment_number| comment\n1.jpg| 0| A man , smiling .\n1.jpg| 1| no\n"
        "2.jpg| 0| A dog .\n",
        'raw,filename\n"[""A man , smiling ."", ""no""]",1.jpg\n"[""A dog .""]",2.jpg\n',
    ],
)
def test_flickr30k_comes_in_two_layouts(tmp_path, text):
    (tmp_path / "f.csv").write_text(text)
    path = str(tmp_path / "f.csv")
    table = made(tmp_path, source="flickr30k", path=path, images="img", count=2)
    assert dict(zip(table["image"], table["prompt"], strict=True)) == {
        "img/1.jpg": "A man , smiling .",
        "img/2.jpg": "A dog .",
    }


@pytest.mark.parametrize(
    ("content", "settings", "part"),
    [
        (None, {"source": "file"}, "there is no file"),
        ("one", {"source": "file"}, "2 wanted, but"),
        ("{}", {"source": "coco", "images": "x"}, "not a COCO captions file"),
        ("a,b\n1,2", {"source": "flickr30k", "images": "x"}, "there are a, b"),
    ],
)
def test_bad_sources_are_one_line(tmp_path, content, settings, part):
    path = tmp_path / "source.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=part) as error:
        made(tmp_path, path=str(path), count=2, **settings)
    assert "\n" not in str(error.value)


def test_a_missing_column_is_named(tmp_path):
    (tmp_path / "p.csv").write_text("text\na\n")
    with pytest.raises(UserError, match="no column 'prompt'; there are text"):
        made(tmp_path, source="file", path=str(tmp_path / "p.csv"), count=1)


def test_real_images_need_their_folder(tmp_path):
    with pytest.raises(UserError, match=r"prompts\.images"):
        made(tmp_path, **{**coco(tmp_path), "images": None}, count=1)


def test_tables_are_read_back_in_order(tmp_path):
    table = made(tmp_path, source="shapeworld", count=4)
    write_prompts(table.iloc[::-1], tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(read_prompts(tmp_path / "t.parquet"), table, check_dtype=False)


def test_a_set_without_images_keeps_none(tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    write_prompts(
        made(tmp_path, source="file", path=str(tmp_path / "p.txt"), count=1), tmp_path / "t.parquet"
    )
    assert read_prompts(tmp_path / "t.parquet")["image"].isna().all()


def test_something_else_is_no_table(tmp_path):
    (tmp_path / "t.parquet").write_text("no")
    with pytest.raises(UserError, match="not a prompt table"):
        read_prompts(tmp_path / "t.parquet")


def test_importing_prompts_needs_no_torch():
    assert not {"torch", "diffusers"} & loaded_by("ecodiff.prompts")
