"""What every stage leaves behind: whole files or none.

Imports no torch.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any
from uuid import uuid4

from ecodiff.runtime.errors import UserError, errno_of
from ecodiff.runtime.locks import claimant

MARKER = "ecodiff.json"  # lies in every folder that `atomic` writes, and lists what it wrote there
SNAKEMAKES = ".snakemake_timestamp"  # which Snakemake puts into folders
LOCK = "{}.lock"  # in the scratch folder of an output
ELSEWHERE = "choose another place or remove it"


def check_output(
    out: str | Path,
    stage: str,
    *,
    folder: bool = False,
    others: Iterable[str | Path | None] = (),
    bytes_needed: int = 0,
) -> None:
    """Before any work: may a command of `stage` write `out`, and is there a place for it?

    Args:
        folder: whether `out` is a folder or a file.
        others: what the command reads, or writes as well; None is skipped.
        bytes_needed: about how large `out` will be.

    Raises:
        UserError: `out` exists and is not what the stage wrote, or is, holds or lies in another.
        OSError: the disk does not take it.
    """
    place = _real(out)
    for other in map(_real, filter(None, others)):
        if place == other:
            raise UserError(f"{out}: is an input or another output too; choose another place")
        if place in other.parents or other in place.parents:
            how = "holds" if place in other.parents else "lies in"
            raise UserError(
                f"{out}: {how} {other}, an input or another output; choose another place"
            )
    _check_place(place, folder)
    writer = _writer(Path(out))
    if place.exists() and writer != stage and (writer or place.is_file()):
        by = f"was written by the stage {writer}" if writer else "was not written by ecodiff"
        raise UserError(f"{out}: exists and {by}; {ELSEWHERE}")
    with _scratch(place) as scratch:
        manifest_of(scratch / place.name).write_bytes(bytes(4096))
    free = shutil.disk_usage(place.parent).free
    if free < bytes_needed:
        sizes = f"about {bytes_needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free"
        raise OSError(errno.ENOSPC, sizes, str(out))


@contextmanager
def atomic(path: str | Path, folder: bool = False) -> Iterator[Path]:
    """A path to write a file at, or an empty folder to fill, that becomes `path` in the end.

    A file at `path` is replaced, and so is a folder that this function wrote, unless someone has
    put a file into it since; on an error it stays and nothing is left. Modes are those that the
    user's umask gives.

    Raises:
        UserError: something else is at `path`.
        OSError: as the block raised it, but about `path`.
    """
    path = _real(path)  # a link stays, what it leads to is replaced
    _check_place(path, folder)
    with _scratch(path) as scratch:
        new, old = scratch / path.name, scratch / f"{path.name}.old"
        if folder:
            new.mkdir()
        yield new
        if folder:
            names = sorted(_names(new))
            (new / MARKER).write_text(json.dumps({"format": 1, "files": names}, indent=1) + "\n")
        _follow_umask(new, scratch.stat().st_mode & 0o666)
        _check_place(path, folder)  # hours may have passed
        if folder and path.exists():
            os.replace(path, old)
        os.replace(new, path)


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


def _check_place(path: Path, folder: bool) -> None:
    """Raise `UserError` where `atomic` would remove what it never wrote."""
    here = _real(".")
    if folder and (path == here or path in here.parents):
        raise UserError(f"{path}: is or holds the working folder; choose another place")
    if os.path.ismount(path):
        raise UserError(f"{path}: a disk is mounted there; choose a place in it")
    if not path.exists():
        return
    if folder != path.is_dir() or not (path.is_dir() or path.is_file()):
        raise UserError(f"{path}: exists and is no {'folder' if folder else 'file'}; {ELSEWHERE}")
    if not folder or not any(path.iterdir()):
        return
    if not (path / MARKER).is_file():
        raise UserError(f"{path}: exists and was not written by ecodiff; {ELSEWHERE}")
    try:
        known = json.loads((path / MARKER).read_text()).get("files")
    except (ValueError, AttributeError):
        known = None
    added = sorted(_names(path) - set(known) - {MARKER, SNAKEMAKES}) if known is not None else []
    if added:
        raise UserError(f"{path}: holds {added[0]}, which ecodiff did not write; move it away")


def _names(folder: Path) -> set[str]:
    """The files of a folder and of those in it."""
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()}


def _follow_umask(new: Path, mode: int) -> None:
    """Give files the mode of files, where a library made them for their owner alone."""
    for file in (new, *new.rglob("*")):
        if file.is_file():
            file.chmod(mode)


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A folder to work in, on the disk of `path`, or the last step would be a copy.

    It holds a file that stays locked for as long as this process lives, so that what a killed one
    left is known, and removed by whoever writes `path` next.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path}: {path.parent} is or lies in a file, not a folder") from None
    sweep(path)
    with _named(path):
        while True:
            scratch = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
            scratch.mkdir()
            lock = scratch / LOCK.format(path.name)
            try:
                with lock.open("w") as held:
                    with suppress(OSError):  # some network disks lock nothing: nothing is swept
                        fcntl.flock(held, fcntl.LOCK_EX)
                    if lock.exists():  # else it was swept before it was locked
                        yield scratch
                        return
            finally:
                shutil.rmtree(scratch, ignore_errors=True)


def sweep(path: Path) -> None:
    """Remove what killed processes left of their work on `path`."""
    for lock in path.parent.glob(f".{escape(path.name)}.*/{LOCK.format(escape(path.name))}"):
        with suppress(OSError):
            with lock.open("r+") as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lock.unlink()
            shutil.rmtree(lock.parent, ignore_errors=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What is raised when a disk fails a library is an OSError that names the output."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number, file = errno_of(error), getattr(error, "filename", None)
        inside = str(file).startswith(str(path.with_name(f".{path.name}.")))
        if number is None or not (file is None or inside):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _writer(output: Path) -> str | None:
    """The stage that wrote an output, by the manifest beside it; None when there is none.

    A stage that was killed before it wrote the manifest is known by its claim.
    """
    path = manifest_of(output)
    if not path.exists():
        return claimant(output)
    try:
        return json.loads(path.read_text())["stage"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: exists and was not written by ecodiff; {ELSEWHERE}") from error


def manifest_of(output: Path) -> Path:
    """Where the manifest of an output lies."""
    return Path(f"{output}.manifest.json")


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with atomic(path) as scratch:
        scratch.write_text(text)


def write_json(path: str | Path, data: Any) -> None:
    """Writes indented JSON, whole or not at all; ValueError where a number is not finite."""
    write_text(path, json.dumps(data, indent=2, default=str, allow_nan=False) + "\n")
