"""Any error is a line for a person and an exit status; only faults of ours come with where."""

import errno
import io
import json
import os
import re

import pandas as pd
import pytest
import torch
from imports import loaded_by
from PIL import Image
from safetensors.numpy import load_file

from ecodiff.runtime.errors import UserError, explained, one_line, tell, users_fault


def raised(call, *words, **options):
    with pytest.raises(Exception) as caught:
        call(*words, **options)
    return caught.value


def fail(error):
    raise error


def write(path, data):
    path.write_bytes(data)
    return path


# What a library raises on what a user gave -> what the line says.
THEIRS = {
    "missing": (lambda folder: (folder / "none").read_text(), "none: No such file"),
    "folder": (lambda folder: folder.read_text(), ": Is a directory"),
    "text": (lambda folder: write(folder / "a", b"\xff").read_text(), "mask: .* not UTF-8"),
    "json": (lambda _: json.loads("{"), "mask: Expecting property name"),
    "empty csv": (lambda _: pd.read_csv(io.StringIO("")), "mask: No columns"),
    "ragged csv": (lambda _: pd.read_csv(io.StringIO("a\n1,2\n1,2,3")), "mask: .*line 3"),
    "parquet": (lambda folder: pd.read_parquet(write(folder / "a", b"x" * 99)), "mask: .*arquet"),
    "picture": (lambda folder: Image.open(write(folder / "a.png", b"x")), r"mask: .*a\.png"),
    "weights": (lambda folder: load_file(write(folder / "a", b"x")), "mask: .*header"),
    "device": (lambda _: torch.device("banana"), "device: .*banana"),
}


@pytest.mark.parametrize("name", THEIRS)
def test_what_libraries_raise_on_what_users_give_is_a_line(tmp_path, name):
    call, line = THEIRS[name]
    found, status = explained(raised(call, tmp_path), "mask")
    assert re.search(line, found)
    assert status == 2


def test_what_a_pipeline_refuses_is_a_line():
    where = {"__name__": "diffusers.pipelines.some.pipeline"}
    exec("def call(): raise ValueError('`height` has to be divisible by 8 but is 65')", where)
    error = raised(where["call"])
    line = "generate: `height` has to be divisible by 8 but is 65"
    assert explained(error, "generate") == (line, 2)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x"),
        OSError(errno.EIO, os.strerror(errno.EIO), "x"),
        RuntimeError("Error while serializing: I/O error: No space left (os error 28)"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_faults_of_the_machine_may_be_tried_again(error):
    assert explained(raised(fail, error), "mask")[1] == 1


@pytest.mark.parametrize(
    "error", [TypeError("a"), ValueError("a"), KeyError("a"), RuntimeError("a"), AssertionError()]
)
def test_what_our_own_code_raises_is_a_fault_of_ours(error):
    assert explained(raised(fail, error), "mask") is None


def test_a_number_that_is_none_in_our_own_notes_is_a_fault_of_ours():
    error = raised(lambda: json.dumps({"a": float("nan")}, indent=2, allow_nan=False))
    assert explained(error, "mask") is None
    assert explained(raised(json.loads, "{"), "mask")[1] == 2


def test_a_fault_of_ours_is_traced_in_a_log_and_its_line_is_the_last(capsys):
    assert tell(raised(fail, TypeError("a\nb")), "mask", debug=False) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "ecodiff: error: internal: TypeError: a b"


def test_on_a_terminal_it_is_a_line_that_says_how_to_see_more(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    tell(raised(fail, TypeError("a")), "mask", debug=False)
    line = "ecodiff: error: internal: TypeError: a; --debug shows where\n"
    assert capsys.readouterr().err == line


def test_what_a_user_can_mend_is_told_from_what_may_be_tried_again(tmp_path, capsys):
    log = tmp_path / "x.log"
    found = {}
    for error in (UserError("x: bad"), OSError(errno.ENOSPC, "no", "x"), TypeError("a")):
        tell(raised(fail, error), "mask", debug=False)
        log.write_text(capsys.readouterr().err + "what a launcher says afterwards\n")
        found[type(error)] = users_fault(log)
    assert found == {UserError: True, OSError: False, TypeError: False}


def test_a_job_without_a_log_was_killed(tmp_path):
    assert not users_fault(tmp_path / "none")


def test_an_error_of_the_users_is_traced_only_when_asked(capsys):
    error = raised(fail, UserError("x: bad"))
    assert tell(error, "mask", debug=False) == 2
    assert capsys.readouterr().err == "ecodiff: error: x: bad\n"
    tell(error, "mask", debug=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "ecodiff: error: x: bad"


def test_a_line_has_no_breaks_nor_what_commands_a_terminal():
    assert one_line("a\n b\r\n\tc\x1b[31m") == "a b c [31m"


def test_what_is_quoted_is_cut_and_what_is_said_of_it_stays():
    line = one_line(f"don't: '{'a prompt ' * 999}' isn't allowed")
    assert len(line) < 120
    assert line.startswith("don't: 'a prompt")
    assert line.endswith(" isn't allowed")


def test_a_path_of_common_length_is_not_cut():
    path = "/a" * 90
    assert one_line(f"{path}: missing") == f"{path}: missing"
    assert len(one_line(f"{path * 99}: missing")) < 220


def test_importing_errors_needs_no_torch():
    assert not {"torch", "diffusers", "pandas"} & loaded_by("ecodiff.runtime.errors")
