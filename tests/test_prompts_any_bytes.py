"""Whatever a file holds: prompts come out, or one line on why not."""

import io
import json
from collections import Counter

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecodiff.config.sections import PromptSet
from ecodiff.prompts import read_prompts
from ecodiff.prompts.sources import READERS
from ecodiff.runtime.errors import UserError


def parquet(**columns):
    file = io.BytesIO()
    pd.DataFrame(columns).to_parquet(file)
    return file.getvalue()


COCO = {
    "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 1, "caption": "a dog"},
        {"id": 2, "image_id": 2, "caption": "a cat"},
    ],
}
WHOLE = [
    ("file", "p.txt", b"a dog\r\na cat\n"),
    ("file", "p.csv", b'id,prompt\n1,"a, ""dog"""\n2,a cat\n'),
    ("file", "p.tsv", b'id\tprompt\n1\t"a dog"\n2\ta cat\n'),
    ("file", "p.jsonl", b'{"prompt": "a dog"}\n{"prompt": "a \\u00e9"}\n'),
    ("file", "p.parquet", parquet(prompt=["a dog", None])),
    ("file", "p.parquet", parquet(prompt=[b"a dog", b"\xff"])),
    ("coco", "c.json", json.dumps(COCO).encode()),
    ("flickr30k", "f.csv", b"image_name| comment_number| comment\n1.jpg| 0| a | dog\n2.jpg| 1 a\n"),
    ("flickr30k", "f.csv", b'filename,raw\n1.jpg,"[""a dog"", ""two""]"\n2.jpg,"[""a cat""]"\n'),
    ("flickr30k", "f.token", b"1.jpg#0\ta dog\n2.jpg#0\ta cat\n"),
    ("gcc", "g.tsv", b"caption\turl\na dog\thttp://a\na cat\thttp://b\n"),
    ("gcc", "g.tsv", b"http://a\ta dog\nhttp://b\ta cat\n"),
]
TABLE = parquet(index=[0, 1], prompt=["a", "b"], seed=[0, 1], image=[None, "x.png"])
PIECES = [
    *(
        b"\n",
        b"\r\n",
        b"\r",
        b"\t",
        b",",
        b"|",
        b'"',
        b'""',
        b"#",
        b" ",
        b"\0",
        b"\xff",
        b"\\ud800",
    ),
    *(b"[", b"]", b"{", b"}", b":", b"null", b"1", b"-1", b"1e999", b"NaN", b"true", b"[]", b"{}"),
    *(b"\xef\xbb\xbf", b"\xff\xfe", "\u2028\x85".encode(), "\N{DOG FACE}".encode(), b"http://c"),
]


def edited(whole):
    """A file with some of its bytes replaced, by what files of such kinds are made of."""

    def apply(edits):
        data = whole
        for place, length, piece in edits:
            start = place % (len(data) + 1)
            data = data[:start] + piece + data[start + length :]
        return data

    piece = st.sampled_from(PIECES) | st.binary(max_size=4)
    edit = st.tuples(st.integers(0, 2**16), st.integers(0, 8), piece)
    return st.lists(edit, min_size=1, max_size=4).map(apply)


CASES = [(*case, edited(case[2])) for case in WHOLE]
CASES += [(source, name, whole, st.binary()) for source, name, whole in WHOLE]


def check_reader(folder, source, name, data):
    path = folder / name
    path.write_bytes(data)
    images = {"images": "x"} if source in ("coco", "flickr30k") else {}
    chosen = PromptSet(source=source, path=str(path), count=1, **images)
    try:
        pairs = READERS[source](chosen, Counter())
    except UserError as error:
        assert "\n" not in str(error)
        assert str(path) in str(error)
        return None
    for caption, _ in pairs:
        assert isinstance(caption, str)
        assert caption == caption.strip() != ""
        caption.encode()
    return pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("any")


def examples(count):
    calm = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=calm,
    )


@pytest.mark.parametrize(("source", "name", "whole"), WHOLE)
def test_whole_files_give_prompts(folder, source, name, whole):
    assert b"\xff" in whole or check_reader(folder, source, name, whole)


@examples(400)
@given(st.data())
def test_a_reader_gives_prompts_or_one_line(folder, data):
    source, name, _, content = data.draw(st.sampled_from(CASES))
    check_reader(folder, source, name, data.draw(content))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
@examples(2000)
@given(st.data())
def test_each_reader_gives_prompts_or_one_line(folder, case, data):
    source, name, _, content = case
    check_reader(folder, source, name, data.draw(content))


def check_table(folder, data):
    path = folder / "t.parquet"
    path.write_bytes(data)
    try:
        table = read_prompts(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert table["index"].is_unique
    assert table["index"].min() >= 0 and table["seed"].min() >= 0
    assert all(isinstance(prompt, str) and prompt.strip() for prompt in table["prompt"])


@examples(100)
@given(edited(TABLE) | st.binary())
def test_a_table_is_read_or_refused(folder, data):
    check_table(folder, data)


@pytest.mark.slow
@examples(2000)
@given(edited(TABLE))
def test_a_damaged_table_is_read_or_refused(folder, data):
    check_table(folder, data)
