import codecs
import logging

import pandas as pd
import pytest
from prompt_files import listed, prompts, refused


def test_a_text_file_holds_a_prompt_a_line(tmp_path):
    table = prompts(tmp_path / "p.txt", "a cat\n\n  a dog \na cow\n", count=2)
    assert table["prompt"].tolist() == ["a cat", "a dog"]
    assert table["image"].tolist() == [None, None]


def test_a_text_file_may_come_from_windows(tmp_path):
    written = codecs.BOM_UTF8 + b"a red ring\r\n\r\na blue square\r\n"
    assert listed(tmp_path / "p.TXT", written, count=2) == ["a red ring", "a blue square"]


@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "jsonl"])
def test_files_that_are_not_utf_8_name_the_line(tmp_path, suffix):
    path = tmp_path / f"p.{suffix}"
    assert refused(path, 'prompt\n"é"'.encode("cp1252")).startswith("FILE, line 2: not UTF-8;")


WORDS = ["None", "NA", "null", "a dog"]


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        ("csv", 'id,prompt\n1,None\n2,\n3,NA\n4,null\n5,"  a dog "\n\n'),
        ("csv", 'id, prompt\n1, None\n2, " "\n3, NA\n4, null\n5, "a dog"\n   \n'),
        ("tsv", "id\tprompt\n1\tNone\n2\t\n3\tNA\n4\tnull\n5\t  a dog \n\n"),
        (
            "jsonl",
            '{"prompt": "None"}\n{"prompt": null}\n{"prompt": "NA"}\n{"prompt": "null"}\n'
            '{"prompt": "  a dog "}\n\n',
        ),
    ],
)
def test_blank_rows_are_counted_and_words_stay_words(tmp_path, caplog, suffix, content):
    caplog.set_level(logging.INFO, "ecodiff")
    assert listed(tmp_path / f"p.{suffix}", content, count=4) == WORDS
    assert caplog.messages[0].endswith("blank rows left out: 2")


@pytest.mark.parametrize("kind", [str, bytes])
def test_parquet_holds_texts_or_their_bytes(tmp_path, caplog, kind):
    values = ["None", None, "NA", "null", " a dog ", " "]
    values = [value if value is None or kind is str else value.encode() for value in values]
    pd.DataFrame({"prompt": values}).to_parquet(tmp_path / "made")
    caplog.set_level(logging.INFO, "ecodiff")
    assert listed(tmp_path / "p.parquet", (tmp_path / "made").read_bytes(), count=4) == WORDS
    assert caplog.messages[0].endswith("blank rows left out: 2")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([1.5, float("nan")], "FILE, row 1: 1.5 is not text"),
        ([["a", "b"]], "FILE, row 1: ['a', 'b'] is not text"),
        ([b"a", b"\xff"], "FILE, row 2: not UTF-8"),
    ],
)
def test_parquet_of_other_values_names_the_row(tmp_path, values, says):
    pd.DataFrame({"prompt": values}).to_parquet(tmp_path / "made")
    assert refused(tmp_path / "p.parquet", (tmp_path / "made").read_bytes()) == says


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_are_read_by_column(tmp_path, suffix):
    path, table = (
        tmp_path / f"p.{suffix}",
        pd.DataFrame({"t": ["a, b", 'a "c"'], "prompt": ["", ""]}),
    )
    {
        "csv": lambda: table.to_csv(path, index=False),
        "tsv": lambda: table.to_csv(path, index=False, sep="\t"),
        "jsonl": lambda: table.to_json(path, orient="records", lines=True),
        "parquet": lambda: table.to_parquet(path),
    }[suffix]()
    assert listed(path, path.read_bytes(), count=2, column="t") == ["a, b", 'a "c"']
    assert "'x'; there are 't', 'prompt'" in refused(path, path.read_bytes(), column="x")


def test_quotes_within_a_tsv_are_the_captions_own(tmp_path):
    written = 'Prompt\tNote\n"G I G" painted\t\n"a ""big"" dog"\t\n"a" and "b"\t\n"\t\n'
    found = listed(tmp_path / "p.tsv", written, count=4, column="Prompt")
    assert found == ['"G I G" painted', 'a "big" dog', '"a" and "b"', '"']


def test_long_prompts_emoji_and_quoted_newlines_stay(tmp_path):
    wanted = ["x" * 10_000, "a \N{DOG FACE}\u2028b", "two\nlines", "$5 and $9"]
    written = "prompt\r\n" + "".join(f'"{prompt}"\r\n' for prompt in wanted)
    assert listed(tmp_path / "p.csv", written, count=4) == wanted


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "p.csv",
            "prompt\na red square, large\na blue ring, small\n",
            "line 2: fields: 2, columns: 1",
        ),
        ("p.csv", 'id,prompt\n1,"a\nb"\n2\n', "line 4: fields: 1, columns: 2"),
        ("p.csv", "id,prompt\n1,a,\n", "line 2: fields: 3, columns: 2"),
        ("p.tsv", "id\tprompt\n1\ta\tb\n", "line 2: fields: 3, columns: 2"),
        ("p.csv", 'prompt\na\n"b\nc\nd\n', "line 3: unexpected end of data"),
        ("p.csv", 'prompt\n"a" dog\n', "line 2: ',' expected after '\"'"),
        ("p.csv", "prompt\na\rb\n", "line 2: new-line character"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON: "),
        ("p.jsonl", "[" * 100_000, "line 1: not JSON: "),
        ("p.jsonl", '\n["a"]\n', "line 2: is no JSON object"),
        ("p.jsonl", '{"prompt": 1}\n', "line 1: 1 is not text"),
        ("p.jsonl", '{"prompt": ["a"]}\n', "line 1: ['a'] is not text"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"text": "a"}\n',
            "line 2: no key 'prompt'; there are 'text'",
        ),
        ("p.jsonl", '{"prompt": "\\ud800"}\n', "line 1: half a character"),
    ],
)
def test_rows_that_are_wrong_are_named(tmp_path, name, content, says):
    assert refused(tmp_path / name, content).startswith(f"FILE, {says}")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.csv", "", "FILE: is empty"),
        ("p.csv", "\n \n", "FILE: is empty"),
        ("p.txt", "", "prompts.count: 1 wanted, but FILE has 0"),
        (
            "p.csv",
            "prompt,prompt\na,b\n",
            "FILE: two columns 'prompt'; there are 'prompt', 'prompt'",
        ),
        ("p.parquet", "prompt\na\n", "FILE: not a whole parquet file: "),
        ("p.xlsx", "", "prompts.path: FILE is not a file of .txt, .csv, .tsv, .jsonl, .parquet"),
    ],
)
def test_files_without_prompts_are_one_line(tmp_path, name, content, says):
    assert refused(tmp_path / name, content).startswith(says)
