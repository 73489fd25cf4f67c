"""The one error that users are meant to see, and a line of what libraries raise."""

from collections.abc import Iterable
from itertools import islice


class UserError(Exception):
    """Bad input: one line that says which key or file, what is wrong and what is allowed."""


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line; its type when it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def listed(names: Iterable[str], most: int = 9) -> str:
    """Names that come from a file, in quotes for one line; long ones and long lists are cut."""
    quoted = [repr(name) for name in islice(names, most + 1)]
    short = [name if len(name) <= 80 else f"{name[:76]}...'" for name in quoted]
    return ", ".join(short if len(short) <= most else [*short[:most], "..."])


class Stopped(Exception):
    """SIGTERM came. What was done is saved, and the same command goes on from there."""

    exit_code = 75  # sysexits.h: a temporary failure, to be tried again
