"""One update of a mask's logits: choose prompts, compute the loss and its gradient, step AdamW."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ecodiff.calibrate import Calibration
from ecodiff.config.sections import MaskSettings
from ecodiff.mask.objective import Budget, Objective, Penalty, distortion, expected_sparsity
from ecodiff.mask.prices import Prices, budgeted
from ecodiff.mask.select import limits_of, matching, select
from ecodiff.mask.sensitivity import closed_means, costs_of_share, first_logits, sensitivity
from ecodiff.models.structures import denoiser_of, maskable_share
from ecodiff.models.units import Structure
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.optimise import in_epochs
from ecodiff.runtime.state import State
from ecodiff.runtime.workers import Workers
from ecodiff.trajectory.activations import affordable_steps
from ecodiff.trajectory.directions import bases_of
from ecodiff.trajectory.gates import Gates
from ecodiff.trajectory.rollout import DenseStep, dense_steps, frozen, rollout

# The ranking counts as settled when at most this share of the units to remove was replaced by
# others over the last `patience` iterations together.
SETTLED = 0.01

log = logging.getLogger(__name__)


class Learner:
    """The gates of a model with their optimiser and objective.

    One update of the logits is `differentiate`, then `apply`. Several processes may share a batch,
    see `Workers`.

    Args:
        pipe: the dense pipeline.
        calibration: what `calibrate` recorded of it.
        settings: the `mask` section.
        sparsity: target of the objective `budget`.
        prices: of the units, where `mask.budget` is not parameters.

    Raises:
        UserError: the sparsity is more than all units together hold.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        calibration: Calibration,
        settings: MaskSettings,
        sparsity: float,
        prices: Prices | None = None,
    ) -> None:
        self.pipe, self.settings = pipe, settings
        self.calibration = calibration.first(settings.prompts)
        self.denoiser, self.sparsity = denoiser_of(pipe), sparsity
        self.workers = Workers(self.denoiser.device)
        together, count = settings.batch * self.workers.count, len(self.calibration.prompts)
        if together > count:
            raise UserError(
                f"mask.batch: {together} prompts pass together, but there are {count}, which would"
                f" repeat; at most {count // self.workers.count} a process"
            )
        structures, self.total = budgeted(pipe, settings.modulation, prices)
        whole = {name for pattern in settings.exclude for name in matching(structures, pattern)}
        structures = [s for s in structures if s.name not in whole]
        first = 0.0 if settings.first_logit == "sensitivity" else settings.first_logit
        means = closed_means(settings, self.calibration)
        bases = bases_of(self.denoiser, structures, self.calibration.moments)
        self.gates = Gates(structures, first, settings.noise_floor, means, bases)
        self.gates.to(self.denoiser.device)
        kinds = {s.name: s.kind for s in structures}
        self.lr = settings.lr.model_dump()
        groups = [
            {"params": [v for k, v in self.gates.logits.items() if kinds[k] == kind], "kind": kind}
            for kind in self.lr
            if kind in kinds.values()
        ]
        self.optimiser = optimiser_of(groups)
        self.objective = _objective(settings, sparsity, structures, self.total)
        self.variance = self.calibration.z0.float().var().item()
        keep = settings.keep_steps
        self.keep_steps = self._affordable() if keep == "auto" else keep

    def info(self, history: list[dict[str, float]]) -> dict[str, Any]:
        """What a saved state holds besides logits and optimiser moments."""
        return {"history": history, "objective": asdict(self.objective)}

    def begin(self, state: State) -> list[dict[str, float]]:
        """Restore a saved state, or set the initial logits. Returns the history so far."""
        found = state.restore(writes=self.workers.is_first)
        if found is None:
            found = self.info([])
            if self.settings.first_logit == "sensitivity":
                self._start_from_sensitivity()
                state.write(found)
        self.objective = replace(self.objective, **found["objective"])
        return found["history"]

    def _start_from_sensitivity(self) -> None:
        """Set the logits to log(cost / price), see `sensitivity.first_logits`.

        The cost is a unit's sensitivity per share of the parameters, the price the cost below which
        the objective removes units.
        """
        settings = self.settings
        found = sensitivity(
            self.pipe,
            self.calibration,
            batch=settings.batch,
            checkpoint=settings.checkpoint,
            seed=settings.seed,
            keep_steps=self.keep_steps,
            means=self.gates.means,
            modulation=settings.modulation,
        )
        costs = costs_of_share(self.gates.structures, found, self.total)
        prices = self.objective.prices(self.gates.structures, costs, self.total)
        with torch.no_grad():
            for s in self.gates.structures:
                self.gates.logits[s.name].copy_(first_logits(costs[s.name], prices[s.kind]))

    def differentiate(self, iteration: int) -> dict[str, float]:
        """Compute the mean gradient over `batch * accumulate` prompts, without an update.

        All randomness comes from the seed and the iteration alone, so a continued run equals one
        that never stopped.

        Returns:
            The row of the history without `changed`, which `apply` adds.

        Raises:
            FloatingPointError: loss or gradients are not finite.
        """
        started, settings = time.perf_counter(), self.settings
        generator = torch.Generator().manual_seed(_mix(settings.seed, 1, iteration))
        self.optimiser.zero_grad(set_to_none=True)
        rows = self._rows(iteration)
        losses = [self._backward(batch, generator) for batch in rows]
        self.workers.average(logits.grad for logits in self.gates.parameters())
        progress = (iteration + 1) / settings.iterations
        removed = expected_sparsity(self.gates, self.total)
        regulariser = self.objective.regulariser(removed, progress)
        # The regulariser depends on the logits alone, so its backward pass does not run the model.
        if regulariser.requires_grad:
            regulariser.backward()
        if not all(logits.grad.isfinite().all() for logits in self.gates.logits.values()):
            prompts = [self.calibration.prompts[i] for batch in rows for i in batch]
            raise FloatingPointError(f"gradients are not finite on prompts {prompts}")
        mean = self.workers.mean(sum(losses) / len(losses))
        return {
            "iteration": iteration,
            "loss": mean + regulariser.item(),
            "distortion": mean,
            "expected_sparsity": sum(share.item() for share in removed.values()),
            "target_sparsity": self.objective.target(progress),
            "regulariser": regulariser.item(),
            "seconds": time.perf_counter() - started,
        }

    def apply(self, row: dict[str, float]) -> dict[str, float]:
        """Update the logits and the Lagrange multipliers; returns the row with `changed`."""
        before, iteration = self._to_remove(), row["iteration"]
        rising = (iteration + 1) / max(1, self.settings.lr_warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr[group["kind"]] * min(1.0, rising)
        self.optimiser.step()
        progress = (iteration + 1) / self.settings.iterations
        self.objective.ascend(row["expected_sparsity"], progress)
        new = self._to_remove() & ~before
        return {**row, "changed": new.sum().item() / max(1, before.sum().item())}

    def is_settled(self, history: list[dict[str, float]]) -> bool:
        """Whether learning may stop early: the target has reached its full value and the units to
        remove have hardly changed for `patience` iterations."""
        patience, last = self.settings.patience, len(history) / self.settings.iterations
        if patience is None or len(history) < patience:
            return False
        if self.objective.target(last) < self.objective.target(1.0):  # false for NaN
            return False
        return sum(row["changed"] for row in history[-patience:]) <= SETTLED

    def _to_remove(self) -> Tensor:
        """The units that the present logits would remove: bool (all units,), on the CPU."""
        logits = {name: value.detach() for name, value in self.gates.logits.items()}
        limits = limits_of(self.settings) | {"exclude": ()}  # those have no gates
        kept = select(self.gates.structures, logits, self.sparsity, self.total, **limits)
        return ~torch.cat([*kept.values()])

    def _backward(self, rows: list[int], generator: torch.Generator) -> float:
        """Draw gates for one batch and add its gradient; returns the batch's distortion.

        `rows` are the prompts of all processes; this one computes its own part of them.
        """
        own = self.workers.own(len(rows))
        self.gates.draw(len(rows), generator, own)
        rows = rows[own]
        embeds, noise, dense = self.calibration.batch(rows, self.denoiser.device)
        steps: list[DenseStep] = []
        if self.settings.loss == "per-step":
            steps = dense_steps(self.pipe, embeds, noise, self.calibration.call)
        # The backward pass must be inside, too: it recomputes steps, which need their gates.
        with self.gates.attached(self.denoiser):
            if steps:
                loss = _per_step(self.denoiser, steps)
            else:
                loss = self._end_to_end(embeds, noise, dense)
            value = loss.item()
            if not torch.isfinite(loss):
                prompts = [self.calibration.prompts[i] for i in rows]
                raise FloatingPointError(f"the loss is {value} on prompts {prompts}")
            (loss / self.settings.accumulate).backward()
        return value

    def _end_to_end(self, embeds: dict[str, Tensor], noise: Tensor, dense: Tensor) -> Tensor:
        """mean((z0' - z0)^2) / var(z0), through all steps (EcoDiff, "end-to-end objective")."""
        z0 = rollout(
            self.pipe,
            embeds,
            noise,
            self.calibration.call,
            checkpoint=self.settings.checkpoint,
            keep_steps=self.keep_steps,
            debug=self.settings.debug,
        )
        return distortion(z0, dense, self.variance)

    def _affordable(self) -> int:
        """The number of steps whose activations fit into memory, for `keep_steps: auto`."""
        if not self.settings.checkpoint:
            return 0
        batch = range(min(self.settings.batch, len(self.calibration.prompts)))
        embeds, noise, _ = self.calibration.batch(batch, self.denoiser.device)
        self.gates.open(len(batch))
        with frozen(self.denoiser), self.gates.attached(self.denoiser):
            keep = affordable_steps(
                self.pipe, embeds, noise, self.calibration.call, self.settings.memory_mb
            )
        log.info("mask: activations of %s steps are kept", keep)
        return keep

    def _rows(self, iteration: int) -> list[list[int]]:
        """Indices of the prompts of one update: `accumulate` batches of all processes together.

        Each epoch is a new random order of all prompts.
        """
        batch = self.settings.batch * self.workers.count
        count = len(self.calibration.prompts)
        per_update = batch * self.settings.accumulate
        turns = range(iteration * per_update, (iteration + 1) * per_update)
        rows = in_epochs(turns, count, lambda epoch: _mix(self.settings.seed, 0, epoch))
        return [rows[start : start + batch] for start in range(0, per_update, batch)]


def optimiser_of(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW for the logits.

    No weight decay: it would pull logits down where there is no gradient. A short momentum
    (beta1 = 0.5): with the usual 0.9 the logits keep moving far past the target after the gradient
    has changed its sign.

    Args:
        groups: parameter groups as torch takes them.
    """
    return torch.optim.AdamW(groups, betas=(0.5, 0.999), weight_decay=0.0)


def _per_step(denoiser: nn.Module, steps: list[DenseStep]) -> Tensor:
    """Mean over steps of mean((prediction' - prediction)^2) / var(prediction), a scalar: the gated
    denoiser on the dense model's latents (EcoDiff, ablation "per-step loss")."""
    errors = [
        distortion(step.again(denoiser), step.prediction, step.prediction.var()) for step in steps
    ]
    return torch.stack(errors).mean()


def _objective(
    settings: MaskSettings, sparsity: float, structures: list[Structure], total: int
) -> Objective:
    maskable = {
        kind: maskable_share([s for s in structures if s.kind == kind], total)
        for kind in {s.kind: None for s in structures}
    }
    if settings.objective == "penalty":
        return Penalty(settings.beta, maskable, settings.weights.model_dump())
    possible = sum(maskable.values())
    if not 0 <= sparsity <= possible:
        raise UserError(f"sparsity: {sparsity} is not possible; the range is 0 to {possible:.4f}")
    # Logits that start from sensitivities are near the target from the beginning.
    warmup = 0.0 if settings.first_logit == "sensitivity" else settings.warmup
    return Budget(sparsity, warmup, settings.multiplier_lr)


def _mix(seed: int, purpose: int, index: int) -> int:
    """A seed for one purpose (0 order of prompts, 1 gate noise) and index.

    Neighbouring values of `seed` give different seeds for all indices below a million.
    """
    return (seed * 2 + purpose) * 1_000_003 + index
