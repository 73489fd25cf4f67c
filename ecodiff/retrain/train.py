"""Retraining: a pruned denoiser learns to predict what the dense one predicted (distillation)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from ecodiff.config.sections import RetrainSettings
from ecodiff.models.pipelines import dense_fingerprint
from ecodiff.models.structures import denoiser_of
from ecodiff.retrain.kinds import adapter_of, trainable
from ecodiff.retrain.pictures import Sheets
from ecodiff.retrain.trajectory import Trajectory, read
from ecodiff.retrain.updates import Updates
from ecodiff.runtime.code import code_hash
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.optimise import optimise
from ecodiff.runtime.progress import Row
from ecodiff.runtime.state import State, beside
from ecodiff.runtime.workers import Workers

COLUMNS = ("step", "loss", "held_out", "lr", "seconds")
HELD_OUT = 0.1  # share of the recorded batches that nothing is learned from
COST_ONLY = {"save_every", "checkpoint", "pictures"}  # settings that change no weight

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retrained:
    """What retraining leaves beside the model.

    Attributes:
        history: a row a step: step, loss, held_out (the loss on batches that it does not learn
            from, NaN at steps between checks), lr, seconds.
        adapter: the updates of the kind `lora`, see `kinds.adapter_of`; none of others.
    """

    history: pd.DataFrame
    adapter: dict[str, Tensor]


def retrain(
    pipe: DiffusionPipeline,
    data: Sequence[Path],
    settings: RetrainSettings,
    scratch: Path | None = None,
) -> Retrained:
    """Train the denoiser of a pruned pipeline in place.

    The weights are those with the lowest loss on held-out data, of the start and of the checks
    that a run makes every tenth of its steps.

    Args:
        pipe: the pruned pipeline; its denoiser keeps class, shapes, dtype and device.
        data: folders of `trajectory.record`, of the dense model that it was pruned from.
        settings: a recipe of the section `retrain`.
        scratch: file for the state of an unfinished run, which is continued from there; sheets of
            pictures are drawn beside it. None: neither.

    Raises:
        UserError: the data are of another model or there are too few, a rank above the layers'
            widths, or a loss that is not finite: step and prompts are named, the last good state is
            in `scratch`.
        Stopped: SIGTERM came; the state is in `scratch`.
    """
    denoiser = denoiser_of(pipe)
    dtype, dense = denoiser.dtype, dense_fingerprint(pipe)
    learned, held_out = _split(read(data, pipe, dense))
    with _recomputed(denoiser, settings), trainable(denoiser, settings) as parameters:
        draw = _sheets(pipe, held_out[0], settings, scratch)
        updates = Updates(denoiser, learned, held_out, settings, parameters, dtype, draw)
        identity = {
            "code": code_hash("retrain"),
            "settings": settings.model_dump(exclude=COST_ONLY),
            "model": dense,
            "shapes": {name: list(value.shape) for name, value in parameters.items()},
            "data": [batch.prompts for batch in (*learned, *held_out)],
            "processes": updates.workers.count,
        }
        state = State(scratch, identity, parameters, updates.optimiser, updates.copies)

        def describe(row: Row) -> str:
            return f"retrain {row['step'] + 1:.0f}/{settings.steps} loss {row['loss']:.5f}"

        history = optimise(
            updates, state, settings.steps, settings.save_every, describe, stage="retrain"
        )
        updates.finish()
        adapter = adapter_of(parameters, settings)
    table = pd.DataFrame(history, columns=list(COLUMNS))
    _say_best(table, updates.lowest)
    return Retrained(table, adapter)


def _sheets(
    pipe: DiffusionPipeline, batch: Trajectory, settings: RetrainSettings, scratch: Path | None
) -> Callable[[int], None]:
    """What draws pictures as a model is retrained; nothing where there is no place for them."""
    if scratch is None or not settings.pictures or not Workers(pipe.device).is_first:
        return lambda step: None
    return Sheets(pipe, batch, settings.pictures, beside(scratch, "pictures")).draw


def _split(batches: list[Trajectory]) -> tuple[list[Trajectory], list[Trajectory]]:
    """The batches to learn from, and those of prompts that nothing is learned from."""
    prompts = [*dict.fromkeys(tuple(batch.prompts) for batch in batches)]
    kept = prompts[: max(1, round(HELD_OUT * len(prompts)))]
    if len(prompts) <= len(kept):
        raise UserError(f"retrain: {len(prompts)} batch of prompts is too few; two at least")
    learned = [batch for batch in batches if tuple(batch.prompts) not in kept]
    return learned, [batch for batch in batches if tuple(batch.prompts) in kept]


def _say_best(history: pd.DataFrame, lowest: float) -> None:
    """Where the saved weights are not the last ones."""
    checks = history["held_out"].dropna()
    if checks.empty or checks.min() > lowest:
        log.warning("retrain: no check was better than the pruned model, which stays as it was")
    elif checks.iloc[-1] > lowest:
        log.warning("retrain: step %s is kept, the best on held-out prompts", checks.idxmin() + 1)


@contextmanager
def _recomputed(denoiser: ModelMixin, settings: RetrainSettings) -> Iterator[None]:
    """Gradient checkpointing of blocks, where it is asked for."""
    if not settings.checkpoint:
        yield
        return
    try:
        denoiser.enable_gradient_checkpointing()
    except ValueError as error:
        raise UserError(f"retrain: checkpoint: {error}") from error
    try:
        yield
    finally:
        denoiser.disable_gradient_checkpointing()
