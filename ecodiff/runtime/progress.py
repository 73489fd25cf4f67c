"""What a person sees of a long optimisation: a bar or lines, and TensorBoard where it is there."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from ecodiff.runtime.state import beside

log = logging.getLogger(__name__)
Row = Mapping[str, float]


@contextmanager
def watched(
    total: int, describe: Callable[[Row], str], scratch: Path | None = None
) -> Iterator[Callable[[Row], None]]:
    """Yield a function that shows one row of a history.

    On a terminal it is a progress bar with the time that is left, otherwise a line of the log.

    Args:
        total: rows to come.
        describe: what is said of a row.
        scratch: the file of the optimisation's state; where TensorBoard is installed, numbers are
            written to a folder beside it. None: nowhere.
    """
    board, plain = _tensorboard(scratch), not sys.stderr.isatty()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=plain) as bar:
        task = bar.add_task("", total=total)

        def show(row: Row) -> None:
            number, *_ = row.values()  # the first column counts
            line = describe(row)
            bar.update(task, completed=number + 1, description=line)
            if plain:
                log.info("%s", line)
            if board is not None:
                for name, value in row.items():
                    board.add_scalar(name, value, number)

        yield show
    if board is not None:
        board.close()


def _tensorboard(scratch: Path | None) -> Any:
    """A TensorBoard writer; None where it is not installed or there is no scratch folder."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    if scratch is None:
        return None
    return SummaryWriter(beside(scratch, "tensorboard"))
