import logging

import numpy as np
import pandas as pd
import pytest
from imports import loaded_by
from PIL import Image

from ecodiff.config.sections import PromptSet
from ecodiff.prompts import make_prompts, read_prompts, say_shared, write_prompts
from ecodiff.runtime.errors import UserError
from ecodiff.toys import checker, world


def made(tmp_path, **settings):
    return make_prompts(PromptSet(**settings), tmp_path / "pictures")


def refused(call, *arguments, **settings):
    with pytest.raises(UserError) as error:
        call(*arguments, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def table(**columns):
    rows = {"index": [0, 1], "prompt": ["a", "b"], "seed": [5, 6], "image": [None, None]}
    return pd.DataFrame(rows | columns)


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


def test_only_shapeworld_draws_pictures(tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    made(tmp_path, source="file", path=str(tmp_path / "p.txt"), count=1)
    assert not (tmp_path / "pictures").exists()


def test_what_was_left_out_or_is_there_twice_is_logged_in_one_line(tmp_path, caplog):
    (tmp_path / "p.csv").write_text('prompt\na\n""\nb\na\na\n"two\nlines"\n')
    caplog.set_level(logging.INFO, "ecodiff")
    made(tmp_path, source="file", path=str(tmp_path / "p.csv"), count=5)
    (message,) = caplog.messages
    assert message.endswith(
        "p.csv: blank rows left out: 1, repeated captions: 2, captions of several lines: 1"
    )


def test_nothing_is_logged_of_a_clean_file(tmp_path, caplog):
    (tmp_path / "p.txt").write_text("a\nb\n")
    caplog.set_level(logging.INFO, "ecodiff")
    made(tmp_path, source="file", path=str(tmp_path / "p.txt"), count=2)
    assert not caplog.messages


def test_too_few_prompts_are_refused_with_what_was_left_out(tmp_path):
    (tmp_path / "p.txt").write_text("a\n\nb\n")
    text = refused(made, tmp_path, source="file", path=str(tmp_path / "p.txt"), count=3)
    assert text.startswith("prompts.count: 3 wanted, but ")
    assert text.endswith("p.txt has 2 (blank rows left out: 1)")


def test_the_largest_seeds_stay_what_they_are(tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\n")
    settings = {"source": "file", "path": str(tmp_path / "p.txt"), "count": 2, "seed": 2**63 - 2}
    write_prompts(made(tmp_path, **settings), tmp_path / "t.parquet")
    assert read_prompts(tmp_path / "t.parquet")["seed"].tolist() == [2**63 - 2, 2**63 - 1]


def test_tables_are_read_back_in_order(tmp_path):
    table = made(tmp_path, source="shapeworld", count=4)
    write_prompts(table.iloc[::-1], tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(read_prompts(tmp_path / "t.parquet"), table)


def test_a_set_without_images_keeps_none(tmp_path):
    write_prompts(table(), tmp_path / "t.parquet")
    assert read_prompts(tmp_path / "t.parquet")["image"].tolist() == [None, None]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"index": [0, 2.5]}, "row 1: index is 0.0, not a whole number from 0 to 2^63 - 1"),
        ({"index": [0, -1]}, "row 2: index is -1, not a whole number from 0 to 2^63 - 1"),
        ({"index": [3, 3]}, "row 2: index 3 is there 2 times"),
        ({"seed": [5, 1.5]}, "row 1: seed is 5.0, not a whole number from 0 to 2^63 - 1"),
        ({"seed": [5, None]}, "row 1: seed is 5.0, not a whole number from 0 to 2^63 - 1"),
        ({"seed": [True, False]}, "row 1: seed is True, not a whole number from 0 to 2^63 - 1"),
        ({"seed": ["x", "y"]}, "row 1: seed is 'x', not a whole number from 0 to 2^63 - 1"),
        (
            {"seed": np.array([0, 2**63], dtype=np.uint64)},
            "row 2: seed is 9223372036854775808, not a whole number from 0 to 2^63 - 1",
        ),
        ({"prompt": ["a", None]}, "row 2: prompt is None, not a text"),
        ({"prompt": ["a", " "]}, "row 2: prompt is ' ', not a text"),
        ({"prompt": [1, 2]}, "row 1: prompt is 1, not a text"),
        ({"prompt": [b"a", b"b"]}, "row 1: prompt is b'a', not a text"),
        ({"image": ["x.png", ""]}, "row 2: image is '', not a picture's path or nothing"),
        ({"image": [1, 2]}, "row 1: image is 1, not a picture's path or nothing"),
    ],
)
def test_rows_of_other_values_are_named(tmp_path, columns, says):
    path = tmp_path / "t.parquet"
    table(**columns).to_parquet(path)
    assert refused(read_prompts, path) == f"{path}, {says}"


def test_a_table_needs_its_columns_and_rows(tmp_path):
    path = tmp_path / "t.parquet"
    table().drop(columns="seed").to_parquet(path)
    assert refused(read_prompts, path).endswith(
        ": no column 'seed'; there are 'index', 'prompt', 'image'"
    )
    table().iloc[:0].to_parquet(path)
    assert refused(read_prompts, path) == f"{path}: has no prompts"


def test_what_is_no_table_is_named(tmp_path):
    (tmp_path / "t.parquet").write_text("no")
    assert "not a whole parquet file" in refused(read_prompts, tmp_path / "t.parquet")
    assert refused(read_prompts, tmp_path / "none").endswith("none: there is no such file")
    assert refused(read_prompts, tmp_path) == f"{tmp_path}: is a folder, not a file"


def test_importing_prompts_needs_no_torch():
    assert not {"torch", "diffusers"} & loaded_by("ecodiff.prompts")


def test_captions_that_models_learned_from_are_counted(caplog):
    judged = pd.DataFrame({"prompt": ["a ring", "a square", "a ring"]})
    say_shared(judged, pd.DataFrame({"prompt": ["a ring", "a star"]}), "calibration.parquet")
    assert caplog.messages == ["prompts: 2 of 3 captions are in calibration.parquet too"]
    caplog.clear()
    say_shared(judged, pd.DataFrame({"prompt": ["a star"]}), "calibration.parquet")
    assert not caplog.messages
