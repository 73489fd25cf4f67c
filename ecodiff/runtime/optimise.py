"""The loop around the updates of a long optimisation: its state on disk, what a person sees of it,
and how it ends when it is told to stop or its numbers are not finite."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from ecodiff.runtime.errors import Stopped, UserError
from ecodiff.runtime.progress import Row, watched
from ecodiff.runtime.state import State, Termination

log = logging.getLogger(__name__)


def in_epochs(turns: Iterable[int], count: int, seed: Callable[[int], int]) -> list[int]:
    """Which of `count` things has each turn: all of them once, in random order, before any again.

    Args:
        turns: numbers of turns, from 0.
        count: the number of things.
        seed: of the order of an epoch, by its number.
    """
    orders: dict[int, list[int]] = {}
    chosen = []
    for epoch, place in (divmod(turn, count) for turn in turns):
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed(epoch))
            orders[epoch] = torch.randperm(count, generator=generator).tolist()
        chosen.append(orders[epoch][place])
    return chosen


class Updates(Protocol):
    """What is optimised, one update at a time. What an update does depends on its number and on
    what `State` holds alone, so that a continued run equals one that never stopped."""

    def begin(self, state: State) -> list[dict[str, float]]:
        """Restore a saved state or set the start; the history so far."""

    def differentiate(self, number: int) -> dict[str, float]:
        """Compute the gradients of one update, and change nothing else.

        Raises:
            FloatingPointError: they are not finite; the message says on which prompts.
        """

    def apply(self, row: dict[str, float]) -> dict[str, float]:
        """Make the update; the row of the history, whole."""

    def info(self, history: list[dict[str, float]]) -> dict[str, Any]:
        """What a saved state holds besides tensors; JSON."""

    def is_settled(self, history: list[dict[str, float]]) -> bool:
        """Whether nothing is left to be done before the last update."""


def optimise(
    updates: Updates,
    state: State,
    total: int,
    save_every: int,
    describe: Callable[[Row], str],
    *,
    stage: str,
) -> list[dict[str, float]]:
    """Make all updates that are left.

    Args:
        updates: what is optimised.
        state: where an unfinished run is kept; removed at the end.
        total: the number of updates.
        save_every: updates after which the state is written.
        describe: what a person is told of one row of the history, whose first column counts.
        stage: its name, for messages.

    Returns:
        The history, a row an update.

    Raises:
        UserError: numbers are not finite; the last good state is kept.
        Stopped: SIGTERM came; the state is kept.
    """
    termination = Termination()
    with termination.heeded():
        history = updates.begin(state)
        with watched(total, describe, state.path) as show:
            while len(history) < total and not updates.is_settled(history):
                try:
                    row = updates.differentiate(len(history))
                    with termination.put_off():
                        history.append(updates.apply(row))
                        if len(history) % save_every == 0:
                            state.write(updates.info(history))
                except FloatingPointError as error:
                    state.write(updates.info(history))
                    raise UserError(f"{stage}: update {len(history)}: {error}") from error
                except Stopped:
                    state.write(updates.info(history))
                    log.info("%s: stopped after %s updates; run it again", stage, len(history))
                    raise
                show(history[-1])
    state.discard()
    return history
