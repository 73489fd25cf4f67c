"""The one error that users are meant to see, and a line of what libraries raise."""


class UserError(Exception):
    """Bad input: one line that says which key or file, what is wrong and what is allowed."""


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line; its type when it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class Stopped(Exception):
    """SIGTERM came. What was done is saved, and the same command goes on from there."""

    exit_code = 75  # sysexits.h: a temporary failure, to be tried again
