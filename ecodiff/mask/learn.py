"""Mask learning: the logits of all gates, end to end through the whole denoising trajectory."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ecodiff.calibrate import Calibration
from ecodiff.errors import UserError
from ecodiff.gates import Gates
from ecodiff.mask.objective import Budget, Objective, Penalty, distortion, expected_sparsity
from ecodiff.pipelines import denoiser_of
from ecodiff.rollout import frozen, rollout
from ecodiff.settings import MaskSettings
from ecodiff.state import State
from ecodiff.structures import count_parameters, discover, maskable_share

COLUMNS = (
    "iteration",
    "loss",
    "distortion",
    "expected_sparsity",
    "target_sparsity",
    "regulariser",
    "seconds",
)
SAVE_EVERY = 60.0  # seconds between two writes of the state

log = logging.getLogger(__name__)


def learn_mask(
    pipe: DiffusionPipeline,
    calibration: Calibration,
    settings: MaskSettings,
    sparsity: float,
    scratch: Path | None = None,
) -> tuple[dict[str, Tensor], pd.DataFrame]:
    """Learn a logit a unit (EcoDiff, "end-to-end objective" and "time-step checkpointing").

    Args:
        pipe: the dense pipeline; its text encoders are not used.
        calibration: what `calibrate` recorded of it.
        settings: the `mask` section.
        sparsity: what the objective `budget` aims at; `penalty` doesn't read it.
        scratch: file that holds the state of an unfinished run, which is continued from there.

    Returns:
        Scores, structure name -> fp32 (units,) logits on the CPU; and the history, a row an
        iteration with `COLUMNS`.

    Raises:
        UserError: the calibration is of another model, or the loss stops being finite; iteration
            and prompts are named and the last good state is in `scratch`.
    """
    calibration.check(pipe)
    learner = _Learner(pipe, calibration, settings, sparsity)
    identity = {
        "settings": settings.model_dump(),
        "sparsity": sparsity,
        "calibration": [calibration.fingerprint, calibration.prompts, calibration.seeds],
    }
    state = State(scratch, identity, learner.gates.logits, learner.optimiser)
    history = learner.restored(state)
    written = time.monotonic()
    console = Console(stderr=True)
    with (
        frozen(learner.denoiser),
        Progress(console=console, disable=not sys.stderr.isatty()) as bar,
    ):
        task = bar.add_task("mask", total=settings.iterations, completed=len(history))
        for iteration in range(len(history), settings.iterations):
            try:
                history.append(learner.update(iteration))
            except FloatingPointError as error:
                state.write(learner.info(history))
                raise UserError(f"mask: iteration {iteration}: {error}") from error
            bar.advance(task)
            log.info("%s", _line(history[-1], settings.iterations))
            if time.monotonic() - written > SAVE_EVERY:
                state.write(learner.info(history))
                written = time.monotonic()
    state.discard()
    scores = {name: logits.detach().cpu().clone() for name, logits in learner.gates.logits.items()}
    return scores, pd.DataFrame(history, columns=list(COLUMNS))


class _Learner:
    """Everything one update needs."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        calibration: Calibration,
        settings: MaskSettings,
        sparsity: float,
    ) -> None:
        self.pipe, self.calibration, self.settings = pipe, calibration, settings
        self.denoiser = denoiser_of(pipe)
        structures = discover(self.denoiser)
        self.total = count_parameters(self.denoiser)
        self.gates = Gates(structures, settings.first_logit, settings.noise_floor)
        self.gates.to(self.denoiser.device)
        kinds = {s.name: s.kind for s in structures}
        groups = [
            {"params": [v for k, v in self.gates.logits.items() if kinds[k] == kind], "lr": lr}
            for kind, lr in settings.lr.model_dump().items()
            if kind in kinds.values()
        ]
        # Weight decay would pull logits down with no gradient at all.
        self.optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
        self.objective = _objective(settings, sparsity, maskable_share(structures, self.total))
        self.variance = calibration.z0.float().var().item()

    def info(self, history: list[dict[str, float]]) -> dict[str, Any]:
        """What a state holds beside logits and moments."""
        return {"history": history, "objective": asdict(self.objective)}

    def restored(self, state: State) -> list[dict[str, float]]:
        """Take on a state, if there is one; the history so far."""
        found = state.restore() or self.info([])
        self.objective = replace(self.objective, **found["objective"])
        return found["history"]

    def update(self, iteration: int) -> dict[str, float]:
        """One update of all logits from the mean gradient of `batch * accumulate` prompts.

        Its randomness depends on the seed and the iteration alone, so a continued run is the same
        as one that never stopped. Raises `FloatingPointError` before anything changes.
        """
        started, settings = time.perf_counter(), self.settings
        generator = torch.Generator().manual_seed(_mix(settings.seed, 1, iteration))
        self.optimiser.zero_grad(set_to_none=True)
        rows = self._rows(iteration)
        losses = [self._backward(batch, generator) for batch in rows]
        progress = (iteration + 1) / settings.iterations
        sparsity = expected_sparsity(self.gates, self.total)
        regulariser = self.objective.regulariser(sparsity, progress)
        # Its graph is the logits' own, so this pass is free and needs nothing retained.
        if regulariser.requires_grad:
            regulariser.backward()
        if not all(logits.grad.isfinite().all() for logits in self.gates.logits.values()):
            prompts = [self.calibration.prompts[i] for batch in rows for i in batch]
            raise FloatingPointError(f"gradients are not finite on prompts {prompts}")
        self.optimiser.step()
        self.objective.ascend(sparsity.item(), progress)
        mean = sum(losses) / len(losses)
        return {
            "iteration": iteration,
            "loss": mean + regulariser.item(),
            "distortion": mean,
            "expected_sparsity": sparsity.item(),
            "target_sparsity": self.objective.target(progress),
            "regulariser": regulariser.item(),
            "seconds": time.perf_counter() - started,
        }

    def _backward(self, rows: list[int], generator: torch.Generator) -> float:
        """Add the gradient of one batch's share of the mean distortion; returns its distortion."""
        device = self.denoiser.device
        embeds, noise, dense = self.calibration.batch(rows)
        embeds = {key: value.to(device) for key, value in embeds.items()}
        self.gates.draw(len(rows), generator)
        # The backward pass is inside too: it runs each step again.
        with self.gates.attached(self.denoiser):
            z0 = rollout(
                self.pipe,
                embeds,
                noise.to(device),
                self.calibration.call,
                checkpoint=self.settings.checkpoint,
                keep_steps=self.settings.keep_steps,
            )
            loss = distortion(z0, dense.to(device), self.variance)
            value = loss.item()
            if not torch.isfinite(loss):
                prompts = [self.calibration.prompts[i] for i in rows]
                raise FloatingPointError(f"the loss is {value} on prompts {prompts}")
            (loss / self.settings.accumulate).backward()
        return value

    def _rows(self, iteration: int) -> list[list[int]]:
        """The prompts of an update, in batches: all are seen once before any is seen again."""
        batch, count = self.settings.batch, len(self.calibration.prompts)
        per_update = batch * self.settings.accumulate
        places = range(iteration * per_update, (iteration + 1) * per_update)
        orders: dict[int, list[int]] = {}
        for epoch in {place // count for place in places}:
            generator = torch.Generator().manual_seed(_mix(self.settings.seed, 0, epoch))
            orders[epoch] = torch.randperm(count, generator=generator).tolist()
        rows = [orders[place // count][place % count] for place in places]
        return [rows[start : start + batch] for start in range(0, per_update, batch)]


def _objective(settings: MaskSettings, sparsity: float, maskable: float) -> Objective:
    if settings.objective == "penalty":
        return Penalty(settings.beta, maskable)
    if not 0 <= sparsity <= maskable:
        raise UserError(f"sparsity: {sparsity} is not possible; the range is 0 to {maskable:.4f}")
    return Budget(sparsity, settings.warmup, settings.multiplier_lr)


def _mix(seed: int, purpose: int, index: int) -> int:
    """A seed for one purpose and index; neighbouring seeds share no stream."""
    return (seed * 2 + purpose) * 1_000_003 + index


def _line(row: dict[str, float], iterations: int) -> str:
    return (
        f"mask {row['iteration'] + 1:.0f}/{iterations} distortion {row['distortion']:.5f}"
        f" expected sparsity {row['expected_sparsity']:.4f} ({row['seconds']:.1f} s)"
    )
