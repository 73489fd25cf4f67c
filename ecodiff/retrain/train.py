"""Retraining: a pruned denoiser learns to predict what the dense one predicted (distillation).

    loss = mean((eps'(x_t, t, c) - eps(x_t, t, c))^2) / var(eps)

with x_t the dense model's own latents at the steps it draws in, and eps its predictions there, with
both branches of classifier-free guidance: guidance multiplies what the unconditional branch drifts.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor, nn

from ecodiff.config.sections import RetrainSettings
from ecodiff.models.pipelines import dense_fingerprint
from ecodiff.models.structures import denoiser_of
from ecodiff.retrain.kinds import trainable
from ecodiff.retrain.trajectory import Trajectory, read
from ecodiff.runtime.code import code_hash
from ecodiff.runtime.errors import Stopped, UserError
from ecodiff.runtime.progress import Row, watched
from ecodiff.runtime.state import State, Termination
from ecodiff.trajectory.rollout import prediction_of

COLUMNS = ("step", "loss", "held_out", "lr", "seconds")
HELD_OUT = 0.1  # share of the recorded batches that nothing is learned from
CHECKS = 10  # how often a run looks at them
COST_ONLY = {"save_every"}  # settings that change no weight

log = logging.getLogger(__name__)


def retrain(
    pipe: DiffusionPipeline,
    data: Sequence[Path],
    settings: RetrainSettings,
    scratch: Path | None = None,
) -> pd.DataFrame:
    """Train the denoiser of a pruned pipeline in place.

    Args:
        pipe: the pruned pipeline; its denoiser keeps class, shapes, dtype and device.
        data: folders of `trajectory.record`, of the dense model that it was pruned from.
        settings: the section `retrain.lora`, `retrain.full` or `retrain.light`.
        scratch: file for the state of an unfinished run, which is continued from there.

    Returns:
        A row a step: step, loss, held_out (the loss on batches that it does not learn from, NaN at
        steps between checks), lr, seconds since the start.

    Raises:
        UserError: the data are of another model or there are too few, a rank above the layers'
            widths, or a loss that is not finite: step and prompts are named, the last good state is
            in `scratch`.
        Stopped: SIGTERM came; the state is in `scratch`.
    """
    denoiser = denoiser_of(pipe)
    batches = read(data, pipe, dense_fingerprint(pipe))
    kept = max(1, round(HELD_OUT * len(batches)))
    if len(batches) <= kept:
        raise UserError(f"retrain: {len(batches)} batch of prompts is too few; two at least")
    learned, held_out = batches[kept:], batches[:kept]
    with trainable(denoiser, settings) as parameters:
        # No weight decay: it would pull the weights towards zero, with no gradient at all.
        optimiser = torch.optim.AdamW(parameters.values(), lr=settings.lr, weight_decay=0.0)
        identity = {
            "code": code_hash("retrain"),
            "settings": settings.model_dump(exclude=COST_ONLY),
            "model": dense_fingerprint(pipe),
            "shapes": {name: list(value.shape) for name, value in parameters.items()},
            "data": [batch.prompts for batch in batches],
        }
        state = State(scratch, identity, parameters, optimiser)
        loop = _Loop(denoiser, learned, held_out, settings, optimiser, parameters)
        history = loop.run(state)
    return pd.DataFrame(history, columns=list(COLUMNS))


class _Loop:
    """The updates of one run. What an update does depends on its number and the seed alone, so a
    continued run is the same as one that never stopped."""

    def __init__(
        self,
        denoiser: nn.Module,
        learned: list[Trajectory],
        held_out: list[Trajectory],
        settings: RetrainSettings,
        optimiser: torch.optim.Optimizer,
        parameters: dict[str, nn.Parameter],
    ) -> None:
        self.denoiser, self.held_out = denoiser, held_out
        self.settings, self.optimiser = settings, optimiser
        self.parameters = list(parameters.values())
        self.places = [(batch, call) for batch in learned for call in range(batch.steps)]
        self.schedule = get_cosine_schedule_with_warmup(
            optimiser, round(settings.warmup * settings.steps), settings.steps
        )

    def run(self, state: State) -> list[dict[str, Any]]:
        """All updates that are left; the whole history."""
        found = state.restore() or {"history": []}
        history, settings = found["history"], self.settings
        before = history[-1]["seconds"] if history else 0.0
        start, termination = time.perf_counter() - before, Termination()
        with (
            termination.heeded(),
            watched(settings.steps, self._line, state.path) as show,
        ):
            while len(history) < settings.steps:
                try:
                    loss = self._differentiate(len(history))
                    with termination.put_off():
                        history.append(self._apply(len(history), loss, start))
                        if len(history) % settings.save_every == 0:
                            state.write({"history": history})
                except FloatingPointError as error:
                    state.write({"history": history})
                    raise UserError(f"retrain: step {len(history)}: {error}") from error
                except Stopped:
                    state.write({"history": history})
                    log.info("retrain: stopped after %s steps; run it again", len(history))
                    raise
                show(history[-1])
        state.discard()
        return history

    def _differentiate(self, step: int) -> float:
        """Put the gradient of one batch at one recorded call into the parameters."""
        batch, number = self._choose(step)
        self.optimiser.zero_grad(set_to_none=True)
        loss = self._loss(batch, number)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        if not (loss.isfinite() and norm.isfinite()):
            raise FloatingPointError(
                f"the loss is {loss.item()} on prompts {batch.prompts[:3]}...; lower the key lr"
            )
        return loss.item()

    def _apply(self, step: int, loss: float, start: float) -> dict[str, float]:
        # The schedule has no memory of its own: it is set to the step, also after a restart.
        factor = self.schedule.lr_lambdas[0](step)
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.lr * factor
        self.optimiser.step()
        last = step + 1 == self.settings.steps
        checked = last or step % max(1, self.settings.steps // CHECKS) == 0
        return {
            "step": step,
            "loss": loss,
            "held_out": self._on_held_out() if checked else math.nan,
            "lr": self.settings.lr * factor,
            "seconds": time.perf_counter() - start,
        }

    def _choose(self, step: int) -> tuple[Trajectory, int]:
        """All calls of all batches are seen once, in random order, before any is seen again."""
        epoch, place = divmod(step, len(self.places))
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.places), generator=generator)
        return self.places[int(order[place])]

    @torch.no_grad()
    def _on_held_out(self) -> float:
        """The mean loss on all calls of the first held-out batch."""
        batch = self.held_out[0]
        losses = [self._loss(batch, call).item() for call in range(batch.steps)]
        return sum(losses) / len(losses)

    def _loss(self, batch: Trajectory, number: int) -> Tensor:
        """The squared distance to the dense prediction, relative to its variance."""
        parameter = next(self.denoiser.parameters())
        step = batch.step(number, parameter.device, parameter.dtype)
        # Adapters are float32 on a model of half precision: their products are of its dtype.
        half = parameter.dtype != torch.float32
        with torch.autocast(parameter.device.type, parameter.dtype, enabled=half):
            output = self.denoiser(*step.args, **step.kwargs)
        wanted = step.prediction.float()
        return (prediction_of(output).float() - wanted).square().mean() / wanted.var()

    def _line(self, row: Row) -> str:
        return (
            f"retrain {row['step'] + 1:.0f}/{self.settings.steps} loss {row['loss']:.5f}"
            f" ({row['seconds']:.0f} s)"
        )
