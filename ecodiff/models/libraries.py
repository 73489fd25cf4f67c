"""What diffusers and transformers say by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

_LOGS = (diffusers_logging, transformers_logging)


def hide_bars() -> None:
    """From now on. Bars are for people; a job's log wants lines, and ours has its own."""
    for log in _LOGS:
        log.disable_progress_bar()


@contextmanager
def errors_only() -> Iterator[None]:
    """Inside, hints and warnings are left out: what matters of them is said in one line of ours."""
    before = [log.get_verbosity() for log in _LOGS]
    for log in _LOGS:
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, level in zip(_LOGS, before, strict=True):
            log.set_verbosity(level)
