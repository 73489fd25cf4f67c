"""Locks that end with their process, whatever ends it. Imports no torch."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ecodiff.runtime.errors import UserError

PATIENCE = 60.0  # seconds: what a scheduler has just killed may take a while to be gone

log = logging.getLogger(__name__)


def lock(path: Path) -> int | None:
    """Lock a file that any user of a machine may have made; it is made where it is missing.

    Returns:
        The open file, for as long as the lock is to last; None where another process holds it.

    Raises:
        OSError: the file cannot be read, or its disk locks nothing (ENOTSUP).
    """
    file = _opened(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        if isinstance(error, BlockingIOError):
            return None
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), str(path)) from error
    return file


def claim_of(out: Path) -> Path:
    """The file that is locked while something is made; it is left only where that was killed."""
    return out.with_name(f".{out.name}.lock")


@contextmanager
def claimed(out: Path, stage: str) -> Iterator[None]:
    """Within it, no other process makes the same thing; one that was told to die may take a minute.

    Args:
        out: what is made; its folder exists.
        stage: what makes it.

    Raises:
        UserError: another process is making it; which, and where.
    """
    path = claim_of(out)
    file = _wait_for(path, out)
    if file is None:  # a disk that locks nothing
        yield
        return
    try:
        who = {"stage": stage, "host": socket.gethostname(), "process": os.getpid()}
        path.write_text(json.dumps({**who, "job": os.environ.get("SLURM_JOB_ID")}))
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _wait_for(path: Path, out: Path) -> int | None:
    until, waiting = time.monotonic() + PATIENCE, False
    while True:
        try:
            file = lock(path)
        except OSError as error:
            if error.errno == errno.ENOTSUP:
                return None
            raise
        if file is not None:
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file)):
                return file
            os.close(file)  # the one who held it has removed it since
        elif time.monotonic() > until:
            raise UserError(f"{out}: {_holder(path)} is making it; wait for that or cancel it")
        elif not waiting:
            log.info("%s: waiting for %s, which is making it", out, _holder(path))
            waiting = True
        time.sleep(0.2 if waiting else 0)


def _holder(path: Path) -> str:
    """Who holds a claim, as users can find it."""
    try:
        found = json.loads(path.read_text())
        if found["job"]:
            return f"job {found['job']} on {found['host']}"
        return f"process {found['process']} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def claimant(out: Path) -> str | None:
    """The stage that was making something when it was killed; None where none was."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads(claim_of(out).read_text())["stage"]
    return None


def _opened(path: Path) -> int:
    """A file that anyone may have made, open for reading, which is enough to lock it here; disks
    of a network want writing."""
    for way in (os.O_RDWR, os.O_RDONLY):
        with suppress(FileNotFoundError, PermissionError):
            return os.open(path, way)
    before = os.umask(0)  # or a strict one would keep the others out
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:  # by now
        return os.open(path, os.O_RDONLY)
    finally:
        os.umask(before)
