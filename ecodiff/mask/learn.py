"""Mask learning: optimise the logits of all gates through the whole denoising loop.

One update is in `learner`; this file says what a run depends on, and what to change when memory
does not suffice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ecodiff.calibrate import Calibration
from ecodiff.config.sections import MaskSettings
from ecodiff.mask.learner import Learner
from ecodiff.mask.prices import Prices
from ecodiff.models.structures import discover
from ecodiff.runtime.code import code_hash
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.optimise import optimise
from ecodiff.runtime.progress import Row
from ecodiff.runtime.state import State
from ecodiff.trajectory.rollout import frozen

COLUMNS = (
    "iteration",
    "loss",
    "distortion",
    "expected_sparsity",
    "target_sparsity",
    "regulariser",
    "changed",
    "seconds",
)
# Settings that change the cost of learning and not its result: a run may be continued with others.
COST_ONLY = {"checkpoint", "keep_steps", "memory_mb", "save_every", "debug"}


def learn_mask(
    pipe: DiffusionPipeline,
    calibration: Calibration,
    settings: MaskSettings,
    sparsity: float,
    scratch: Path | None = None,
    prices: Prices | None = None,
) -> tuple[dict[str, Tensor], pd.DataFrame]:
    """Learn one gate logit per unit (EcoDiff, "end-to-end objective" and "time-step gradient
    checkpointing").

    Args:
        pipe: the dense pipeline; its text encoders are not used.
        calibration: what `calibrate` recorded of this model.
        settings: the `mask` section.
        sparsity: target of the objective `budget`; `penalty` does not read it.
        prices: of the units, where `mask.budget` is not parameters.
        scratch: file for the state of an unfinished run. If it exists and has the same settings,
            data and code, learning continues from it.

    Returns:
        The scores: structure name -> fp32 (units,) logits, on the CPU. And the history with
        `COLUMNS`, one row per iteration; `changed` is the share of the units to remove that this
        iteration replaced by others.

    Raises:
        UserError: the calibration is of another model, a batch does not fit into memory, or loss or
            gradients are not finite; then iteration and prompts are named, and the last good state
            is in `scratch`.
        Stopped: SIGTERM arrived; the state is in `scratch`.
    """
    calibration = calibration.for_dense(pipe)
    with _memory_explained(settings):
        learner = Learner(pipe, calibration, settings, sparsity, prices)
    identity = {
        "code": code_hash("mask.learn"),
        "settings": settings.model_dump(exclude=COST_ONLY),
        "sparsity": sparsity,
        "processes": learner.workers.count,
        "calibration": [calibration.fingerprint, calibration.prompts, calibration.seeds],
    }
    state = State(scratch, identity, learner.gates.logits, learner.optimiser)
    with _memory_explained(settings), frozen(learner.denoiser):
        describe = partial(_line, settings.iterations)
        history = optimise(
            learner, state, settings.iterations, settings.save_every, describe, stage="mask"
        )
    logits = {name: value.detach().cpu().clone() for name, value in learner.gates.logits.items()}
    # What is excluded was not learned.
    whole = {s.name: torch.full((s.units,), torch.inf) for s in discover(pipe, settings.modulation)}
    scores = whole | logits
    return scores, pd.DataFrame(history, columns=list(COLUMNS))


@contextmanager
def _memory_explained(settings: MaskSettings) -> Iterator[None]:
    """Turn an out-of-memory error into one line that says which setting to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"mask: out of memory; {_what_fits(settings)}") from error


def _what_fits(settings: MaskSettings) -> str:
    """The next setting to change so that the same update takes less memory."""
    if not settings.checkpoint:
        return "set checkpoint: true"
    if settings.keep_steps == "auto" or settings.keep_steps > 0:
        return "set keep_steps: 0, or a smaller memory_mb with keep_steps: auto"
    if settings.batch > 1:
        batch = settings.batch // 2
        accumulate = -(-settings.batch * settings.accumulate // batch)
        return f"set batch: {batch} and accumulate: {accumulate}"
    return "one prompt does not fit: load the model in bfloat16, or spread it with device_map"


def _line(iterations: int, row: Row) -> str:
    return (
        f"mask {row['iteration'] + 1:.0f}/{iterations} distortion {row['distortion']:.5f}"
        f" expected sparsity {row['expected_sparsity']:.4f} ({row['seconds']:.1f} s)"
    )
