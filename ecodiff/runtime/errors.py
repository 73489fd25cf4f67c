"""The one error that users are meant to see, and how any other is told."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

USERS_FAULT, MACHINES_FAULT = 2, 1  # exit statuses; what a machine failed at may be tried again
ERROR = "ecodiff: error: "  # begins the last line of a command that failed
MACHINE, INTERNAL = "machine: ", "internal: "  # what follows it where a user can mend nothing
MISUSES = {  # of files; other numbers are the machine's
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.EPERM,
    errno.EROFS,
}
# Libraries that read what users give; their ValueErrors are about that.
READERS = {
    *("PIL", "diffusers", "huggingface_hub", "json", "pandas", "pyarrow", "safetensors"),
    *("tokenizers", "transformers", "yaml"),
}
NETWORK = {"http", "httpx", "requests", "urllib", "urllib3"}
NO_MEMORY = re.compile(r"out of memory|(can't|cannot|failed to) allocate memory", re.IGNORECASE)
NO_DEVICE = re.compile(
    r"no CUDA GPUs|not compiled with CUDA|no NVIDIA driver|invalid device ordinal|device string"
    r"|device type",
    re.IGNORECASE,
)


class UserError(Exception):
    """Bad input: one line that says which key or file, what is wrong and what is allowed."""


class Stopped(Exception):
    """SIGTERM came. What was done is saved, and the same command goes on from there."""

    exit_code = 75  # sysexits.h: a temporary failure, to be tried again


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line; its type when it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def errno_of(error: BaseException) -> int | None:
    """The system's error number behind an error, also behind one of a library in Rust."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def listed(names: Iterable[str], most: int = 9) -> str:
    """Names that come from a file, in quotes for one line; long ones and long lists are cut."""
    quoted = [repr(name) for name in islice(names, most + 1)]
    short = [name if len(name) <= 80 else f"{name[:76]}...'" for name in quoted]
    return ", ".join(short if len(short) <= most else [*short[:most], "..."])


def tell(error: Exception, where: str, debug: bool) -> int:
    """Print an error to stderr, its line last.

    A fault of ours comes with its traceback where stderr is a log, which nobody can ask again.

    Args:
        where: the command, for errors that name no file or key.
        debug: print the traceback of any error.

    Returns:
        The exit status: 2 for what a user can mend, 1 for what the machine or we did wrong.
    """
    known = explained(error, where)
    traced = debug or (known is None and not sys.stderr.isatty())
    if traced:
        traceback.print_exception(error)
    if known is None:
        line, status = f"{INTERNAL}{type(error).__name__}: {error}", MACHINES_FAULT
        tail = "" if traced else "; --debug shows where"
    else:
        (line, status), tail = known, ""
        line = f"{MACHINE}{line}" if status == MACHINES_FAULT else line
    print(f"{ERROR}{one_line(line)}{tail}", file=sys.stderr)
    return status


def users_fault(log: Path) -> bool:
    """Whether a command's log says that it failed at what only its user can mend."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return False
    ours = (f"{ERROR}{MACHINE}", f"{ERROR}{INTERNAL}")
    return any(line.startswith(ERROR) and not line.startswith(ours) for line in lines)


def explained(error: Exception, where: str) -> tuple[str, int] | None:
    """What a person needs to know of an error, and the exit status; None for a fault of ours."""
    if isinstance(error, UserError):
        return str(error), USERS_FAULT
    number = errno_of(error)
    if number is not None:
        file = getattr(error, "filename", None) or where
        what = getattr(error, "strerror", None) or os.strerror(number)
        return f"{file}: {what}", USERS_FAULT if number in MISUSES else MACHINES_FAULT
    sources = _sources(error)
    if isinstance(error, OSError):
        status = MACHINES_FAULT if sources & NETWORK else USERS_FAULT
        return f"{where}: {first_line(error)}", status
    if isinstance(error, MemoryError | RuntimeError) and (
        isinstance(error, MemoryError) or NO_MEMORY.search(str(error))
    ):
        return f"{where}: out of memory; a smaller batch or model may fit", MACHINES_FAULT
    if isinstance(error, RuntimeError | AssertionError) and NO_DEVICE.search(str(error)):
        return f"device: {first_line(error)}", USERS_FAULT
    if isinstance(error, UnicodeError):
        return f"{where}: a text file is not UTF-8 ({error})", USERS_FAULT
    if type(error).__module__.partition(".")[0] in READERS or (
        isinstance(error, ValueError | NotImplementedError) and sources & READERS
    ):
        return f"{where}: {first_line(error)}", USERS_FAULT
    return None


def _sources(error: Exception) -> set[str]:
    """The libraries that an error's type comes from and that raised it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [
        type(error).__module__,
        *(frame.f_globals.get("__name__", "") for frame in frames[-1:]),
    ]
    # What cannot be written as JSON is of our own making.
    return {name.partition(".")[0] for name in names if name != "json.encoder"}


def one_line(text: str) -> str:
    """A text without line breaks, where what it quotes and long words are cut."""
    text = "".join(c if c.isprintable() else " " for c in text)
    text = re.sub(r"(?<!\w)(['\"])(.{81,}?)\1(?!\w)", lambda m: m[1] + _cut(m[2], 80) + m[1], text)
    text = re.sub(r"\S{201,}", lambda word: _cut(word[0], 200), " ".join(text.split()))
    return _cut(text, 1000)


def _cut(text: str, length: int) -> str:
    """A text whose middle is left out where it is too long."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"
