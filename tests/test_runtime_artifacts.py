import errno
import os
import subprocess
import sys

import numpy as np
import pytest
from disks import mounted
from imports import loaded_by
from safetensors.numpy import save_file

from ecodiff.runtime.artifacts import (
    MARKER,
    atomic,
    check_output,
    write_json,
    write_text,
)
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.locks import claim_of
from ecodiff.runtime.provenance import begin


def write_folder(folder, name, text=""):
    with atomic(folder, folder=True) as scratch:
        (scratch / name).write_text(text)


def test_a_file_appears_when_it_is_whole(tmp_path):
    with atomic(tmp_path / "deep/file") as scratch:
        scratch.write_text("x")
        assert not (tmp_path / "deep/file").exists()
    assert (tmp_path / "deep/file").read_text() == "x"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_after_an_error_the_old_one_stays_and_nothing_else(tmp_path, kind):
    target = tmp_path / "target"
    inner = target if kind == "file" else target / "inner"
    write_folder(target, "inner", "old") if kind == "folder" else write_text(target, "old")
    with pytest.raises(RuntimeError), atomic(target, folder=kind == "folder") as scratch:
        (scratch / "half" if kind == "folder" else scratch).write_text("half")
        raise RuntimeError
    assert inner.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    write_folder(tmp_path / "f", "stale")
    write_folder(tmp_path / "f", "new")
    assert {path.name for path in (tmp_path / "f").iterdir()} == {"new", MARKER}
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def thesis(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "thesis").write_text("years")
    return folder


def test_a_folder_of_someone_else_is_never_replaced(tmp_path):
    with pytest.raises(UserError, match="not written by ecodiff"):
        write_folder(thesis(tmp_path / "f"), "new")
    assert [path.name for path in (tmp_path / "f").iterdir()] == ["thesis"]


def test_nor_is_one_of_ours_that_someone_has_put_a_file_into(tmp_path):
    write_folder(tmp_path / "f", "ours")
    write_folder(tmp_path / "f", "ours")
    (tmp_path / "f/.snakemake_timestamp").touch()
    write_folder(tmp_path / "f", "ours")
    thesis(tmp_path / "f/deep")
    with pytest.raises(UserError, match=r"holds deep/thesis, which ecodiff did not write"):
        write_folder(tmp_path / "f", "new")
    assert (tmp_path / "f/deep/thesis").read_text() == "years"
    assert (tmp_path / "f/ours").exists()


def test_nor_is_one_that_came_during_the_work(tmp_path):
    with pytest.raises(UserError, match="not written"), atomic(tmp_path / "f", folder=True):
        thesis(tmp_path / "f")
    assert (tmp_path / "f/thesis").read_text() == "years"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_file_does_not_take_the_place_of_a_folder_nor_the_other_way_round(tmp_path):
    write_folder(tmp_path / "f", "a")
    write_text(tmp_path / "g", "")
    with pytest.raises(UserError, match="is no file"):
        write_text(tmp_path / "f", "")
    with pytest.raises(UserError, match="is no folder"):
        write_folder(tmp_path / "g", "a")


def test_a_pipe_or_a_device_is_no_place_for_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is no file"):
        write_text(tmp_path / "pipe", "")


@pytest.mark.parametrize("place", [".", "..", "/"])
def test_the_working_folder_is_never_replaced(tmp_path, monkeypatch, place):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(UserError, match="working folder"):
        write_folder(place, "x")
    with pytest.raises(UserError):
        write_text(place, "x")


def test_a_link_stays_and_leads_to_what_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    write_folder(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk/x").exists()


def test_modes_are_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic(tmp_path / "f", folder=True) as scratch:
            (scratch / "sub").mkdir()
            (scratch / "sub/x").touch(0o600)  # as safetensors does
        with atomic(tmp_path / "g") as scratch:
            scratch.touch(0o600)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"f": 0o750, "sub": 0o750, "x": 0o640, MARKER: 0o640, "g": 0o640}


HALF_DONE = """
import sys, time
from ecodiff.runtime.artifacts import atomic
with atomic(sys.argv[1]) as scratch:
    scratch.write_text("half")
    print("there", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_job_left_goes_and_a_live_ones_stays(tmp_path):
    target = tmp_path / "a[b]*"
    words = [sys.executable, "-c", HALF_DONE, target]
    jobs = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(2)]
    for job in jobs:
        assert job.stdout.readline() == b"there\n"
    assert len([*tmp_path.iterdir()]) == 2
    jobs[0].kill()
    jobs[0].wait()
    write_text(target, "")
    assert len([*tmp_path.iterdir()]) == 2  # the target and what the live one works in
    jobs[1].kill()
    jobs[1].wait()
    write_text(target, "")
    assert [*tmp_path.iterdir()] == [target]


def test_a_disk_that_is_full_in_the_end_is_told_of_the_output(tmp_path):
    with mounted(tmp_path / "disk", "size=1m") as disk:
        with pytest.raises(OSError, match="No space left") as caught, atomic(disk / "x") as scratch:
            save_file({"x": np.zeros(1 << 19)}, scratch)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(disk / "x")
        assert not [*disk.iterdir()]


def test_a_disk_that_is_mounted_at_an_output_is_told_before_any_work(tmp_path):
    with mounted(tmp_path / "disk") as disk, pytest.raises(UserError, match="mounted"):
        write_folder(disk, "x")


def test_a_read_only_disk_is_told_before_any_work(tmp_path):
    with mounted(tmp_path / "disk", "ro") as disk, pytest.raises(OSError) as caught:
        check_output(disk / "x", "mask")
    assert caught.value.errno == errno.EROFS
    assert caught.value.filename == str(disk / "x")


def test_a_disk_without_the_room_that_is_needed_is_told_before_any_work(tmp_path):
    with pytest.raises(OSError, match=r"1,000,000,000 MB are needed, .* MB are free"):
        check_output(tmp_path / "x", "mask", bytes_needed=10**15)


def test_a_parent_that_is_a_file_is_told_before_any_work(tmp_path):
    write_text(tmp_path / "f", "")
    for place in (tmp_path / "f/x", tmp_path / "f/deep/x"):
        with pytest.raises(UserError, match="a file, not a folder"):
            check_output(place, "mask")


@pytest.mark.parametrize("length", [245, 300])
def test_a_name_that_is_too_long_for_its_manifest_is_told_before_any_work(tmp_path, length):
    with pytest.raises(OSError, match="name too long"):
        check_output(tmp_path / ("x" * length), "mask")


def test_a_check_leaves_nothing(tmp_path):
    check_output(tmp_path / "x", "mask", bytes_needed=1)
    assert not [*tmp_path.iterdir()]


def made(path, stage="mask"):
    write_text(path, "ours")
    begin(stage, []).write_manifest(path, {})
    return path


def test_a_command_replaces_what_its_stage_wrote_and_no_other_file(tmp_path):
    check_output(made(tmp_path / "a"), "mask")
    write_text(tmp_path / "b", "someone's")
    with pytest.raises(UserError, match="not written by ecodiff"):
        check_output(tmp_path / "b", "mask")
    with pytest.raises(UserError, match="by the stage calibrate"):
        check_output(made(tmp_path / "c", "calibrate"), "mask")


def test_what_was_written_just_before_a_kill_is_known_without_its_manifest(tmp_path):
    write_text(tmp_path / "a", "ours")
    with pytest.raises(UserError, match="not written by ecodiff"):
        check_output(tmp_path / "a", "mask")
    claim_of(tmp_path / "a").write_text('{"stage": "mask"}')
    check_output(tmp_path / "a", "mask")
    with pytest.raises(UserError, match="by the stage mask"):
        check_output(tmp_path / "a", "prune")


def test_a_manifest_of_someone_elses_is_not_written_over(tmp_path):
    write_text(tmp_path / "a.manifest.json", "[1]")
    with pytest.raises(UserError, match=r"a\.manifest\.json: exists"):
        check_output(tmp_path / "a", "mask")


@pytest.mark.parametrize(
    ("out", "folder", "other", "how"),
    [
        ("m/a", False, "l/a", "is an"),
        ("m/b", False, "m", "lies in"),
        ("l/b", True, "m", "lies in"),
        ("m", True, "l/a", "holds"),
    ],
)
def test_an_output_is_kept_apart_from_inputs(tmp_path, out, folder, other, how):
    write_folder(tmp_path / "m", "x")
    made(tmp_path / "m/a")
    (tmp_path / "l").symlink_to(tmp_path / "m")
    with pytest.raises(UserError, match=f": {how} .*input"):
        check_output(tmp_path / out, "mask", folder=folder, others=[None, tmp_path / other])


def test_json_ends_in_a_newline(tmp_path):
    write_json(tmp_path / "a.json", {"a": None})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": null\n}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_json_is_never_written(tmp_path, value):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": value})
    assert not list(tmp_path.iterdir())


def test_importing_artifacts_needs_no_torch():
    assert not {"torch", "diffusers"} & loaded_by("ecodiff.runtime.artifacts")
