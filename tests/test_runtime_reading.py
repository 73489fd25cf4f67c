import codecs
import re
from pathlib import Path

import pandas as pd
import pytest

from ecodiff.runtime.errors import UserError
from ecodiff.runtime.reading import read_columns, read_lines, read_text


def refused(read, path, *arguments):
    with pytest.raises(UserError) as error:
        read(path, *arguments)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(str(path))
    return text.removeprefix(str(path))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "file"


def test_a_byte_order_mark_is_no_text(file):
    file.write_bytes(codecs.BOM_UTF8 + "é".encode())
    assert read_text(file) == "é"


@pytest.mark.parametrize(
    ("written", "lines"),
    [
        (b"", []),
        (b"a", ["a"]),
        (b"a\r\n\r\nb\r\n", ["a", "", "b"]),
        (
            "a\u2028b\x85c\x0bd\x0ce\x1cf\u2029g\rh\n".encode(),
            ["a\u2028b\x85c\x0bd\x0ce\x1cf\u2029g\rh"],
        ),
    ],
)
def test_a_newline_alone_ends_a_line(file, written, lines):
    file.write_bytes(written)
    assert read_lines(file) == lines


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_recognised(file, encoding):
    file.write_bytes("a red ring\na blue square".encode(encoding))
    assert re.fullmatch(
        r", line 1: not UTF-8; .*iconv -f UTF-16 -t UTF-8", refused(read_text, file)
    )


def test_the_line_that_is_not_utf_8_is_named(file):
    file.write_bytes("one\nun café\n".encode("cp1252"))
    assert re.fullmatch(
        r", line 2: not UTF-8; .*iconv -f CP1252 -t UTF-8", refused(read_text, file)
    )


def test_what_is_wrong_with_a_path_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert refused(read_text, tmp_path / "none") == ": there is no such file"
    assert refused(read_text, tmp_path) == ": is a folder, not a file"
    assert refused(read_text, tmp_path / "file" / "in") == ": cannot be read: Not a directory"
    assert refused(read_text, tmp_path / ("n" * 300)) == ": cannot be read: File name too long"

    def forbidden(self):
        raise PermissionError

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    assert refused(read_text, tmp_path / "file") == ": no permission to read it"


def test_columns_come_as_they_are_asked_for(file):
    pd.DataFrame({"a": [1, 2], "b": ["x", None], "c": [b"\xff", b""]}).to_parquet(file)
    assert read_columns(file, ["c", "b"]) == [[b"\xff", b""], ["x", None]]


def test_the_columns_that_are_there_are_named(file):
    pd.DataFrame({"a": [1], "b": [2]}).to_parquet(file)
    assert refused(read_columns, file, ["a", "z"]) == ": no column 'z'; there are 'a', 'b'"


def test_only_whole_parquet_is_read(file):
    pd.DataFrame({"a": range(9)}).to_parquet(file)
    whole = file.read_bytes()
    for damaged in (b"", b"a,b\n1,2\n", whole[:-9], whole[:4] + b"\xff" * 40 + whole[44:]):
        file.write_bytes(damaged)
        assert refused(read_columns, file, ["a"]).startswith(": not a whole parquet file: ")
