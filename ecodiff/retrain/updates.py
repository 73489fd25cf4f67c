"""One update of a model that is retrained: choose what to learn from, differentiate, step AdamW.

    loss = mean((eps'(x_t, t, c) - eps(x_t, t, c))^2) / var(eps)

with x_t the dense model's own latents at the steps it draws in, and eps its predictions there, with
both branches of classifier-free guidance: guidance multiplies what the unconditional branch drifts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ecodiff.config.sections import RetrainSettings
from ecodiff.retrain.kinds import Parameters
from ecodiff.retrain.trajectory import Trajectory
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.optimise import in_epochs
from ecodiff.runtime.state import State
from ecodiff.runtime.workers import Workers
from ecodiff.trajectory.rollout import prediction_of

CHECKS = 10  # how often a run looks at what it does not learn from
CHECKED = 16  # at how many calls of the denoiser it looks then
Place = tuple[Trajectory, int]  # a recorded batch, and which call of the denoiser


class Updates:
    """The updates of one run, see `runtime.optimise`.

    Args:
        denoiser: the pruned one, its parameters ready for training.
        learned: recorded batches to learn from.
        held_out: recorded batches to look at only.
        settings: the recipe.
        parameters: what is trained.
        dtype: what the model computes in.
        on_check: called with the number of steps made, whenever held-out data are looked at.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        learned: Sequence[Trajectory],
        held_out: Sequence[Trajectory],
        settings: RetrainSettings,
        parameters: Parameters,
        dtype: torch.dtype,
        on_check: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.denoiser, self.settings, self.parameters = denoiser, settings, parameters
        self.dtype, self.on_check = dtype, on_check
        self.workers = Workers(denoiser.device)
        self.places = _places(learned)
        found = _places(held_out)
        self.checked = found[:: max(1, len(found) // CHECKED)][:CHECKED]
        self.optimiser = _optimiser(settings, parameters)
        self.schedule = _schedule(settings)
        # In host memory: on a GPU it would not fit beside all that is trained.
        self.best = {name: v.detach().to("cpu", copy=True) for name, v in parameters.items()}
        self.lowest = math.inf
        self.average = EMAModel(parameters.values(), settings.average) if settings.average else None

    @property
    def copies(self) -> dict[str, dict[str, Tensor]]:
        """The copies of the parameters that belong to a saved state."""
        averages = self.average.shadow_params if self.average else []
        return {
            "best": self.best,
            "average": dict(zip(self.parameters, averages, strict=False)),
        }

    def info(self, history: list[dict[str, float]]) -> dict[str, Any]:
        """What a saved state holds besides weights and moments."""
        return {"history": history, "lowest": self.lowest}

    def begin(self, state: State) -> list[dict[str, float]]:
        """Restore a saved state, or look at the pruned model as it is. The history so far."""
        found = state.restore(writes=self.workers.is_first)
        if found is None:
            self.lowest = self._held_out()
            self.on_check(0)
            return []
        self.lowest = found["lowest"]
        if self.average:
            self.average.optimization_step = len(found["history"])
        return found["history"]

    def is_settled(self, history: list[dict[str, float]]) -> bool:
        """Never: all steps are made."""
        return False

    def differentiate(self, number: int) -> dict[str, float]:
        """Put the mean gradient of the update's batches into the parameters.

        Raises:
            FloatingPointError: loss or gradient is not finite; some of the prompts are named.
        """
        started = time.perf_counter()
        self.optimiser.zero_grad(set_to_none=True)
        places = self._chosen(number)
        own = places[self.workers.own(len(places))]
        losses = [self._backward(batch, call) / len(own) for batch, call in own]
        gradients = [value.grad for value in self.parameters.values() if value.grad is not None]
        self.workers.average(gradients)
        loss = self.workers.mean(sum(losses))
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip)
        if not (math.isfinite(loss) and norm.isfinite()):
            prompts = [batch.prompts[:3] for batch, _ in places]
            raise FloatingPointError(f"the loss is {loss} on prompts {prompts}; lower the key lr")
        return {"step": number, "loss": loss, "seconds": time.perf_counter() - started}

    def apply(self, row: dict[str, float]) -> dict[str, float]:
        """Step the optimiser; look at held-out data every tenth of the run."""
        started, step = time.perf_counter(), int(row["step"])
        # The schedule has no memory of its own: it is set to the step, also after a restart.
        lr = self.settings.lr * self.schedule(step)
        for group in self.optimiser.param_groups:  # torchao's is a tensor
            group["lr"] = torch.full_like(group["lr"], lr) if torch.is_tensor(group["lr"]) else lr
        with _drawing(self.settings.seed * 1_000_003 + step, self.denoiser.device):
            self.optimiser.step()
        if self.average:
            self.average.step(self.parameters.values())
        last, held_out = step + 1 == self.settings.steps, math.nan
        if last or (step + 1) % max(1, self.settings.steps // CHECKS) == 0:
            held_out = self._check(step + 1)
        seconds = row["seconds"] + time.perf_counter() - started
        return {**row, "held_out": held_out, "lr": lr, "seconds": seconds}

    @torch.no_grad()
    def finish(self) -> None:
        """Give the parameters their best values."""
        for name, value in self.parameters.items():
            value.copy_(self.best[name])

    @torch.no_grad()
    def _check(self, step: int) -> float:
        """The loss on held-out data; what is better than all before is kept."""
        with self._averaged():
            found = self._held_out()
            self.on_check(step)
            if found < self.lowest:
                self.lowest = found
                for name, value in self.parameters.items():
                    self.best[name].copy_(value)
        return found

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The parameters are their moving average, where there is one."""
        if not self.average:
            yield
            return
        self.average.store(self.parameters.values())
        self.average.copy_to(self.parameters.values())
        try:
            yield
        finally:
            self.average.restore(self.parameters.values())

    def _chosen(self, number: int) -> list[Place]:
        """What an update learns from, all processes together: all calls of all batches are seen
        once, in random order, before any is seen again."""
        each = self.settings.accumulate * self.workers.count
        turns = range(number * each, (number + 1) * each)
        seed = self.settings.seed * 1_000_003
        chosen = in_epochs(turns, len(self.places), lambda epoch: seed + epoch)
        return [self.places[index] for index in chosen]

    def _held_out(self) -> float:
        """The mean loss at the held-out calls."""
        with torch.no_grad():
            losses = [self._loss(batch, call).item() for batch, call in self.checked]
        return sum(losses) / len(losses)

    def _backward(self, batch: Trajectory, call: int) -> float:
        loss = self._loss(batch, call)
        (loss / self.settings.accumulate).backward()
        return loss.item()

    def _loss(self, batch: Trajectory, call: int) -> Tensor:
        """The squared distance to the dense prediction, relative to its variance."""
        device = self.denoiser.device
        step = batch.step(call, device, self.dtype)
        half = self.dtype != torch.float32
        # Trained weights may be float32 in a model of half precision. bfloat16 has the range of
        # float32, so that gradients need no scale.
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            output = self.denoiser(*step.args, **step.kwargs)
        wanted = step.prediction.float()
        return (prediction_of(output).float() - wanted).square().mean() / wanted.var()


def _places(batches: Sequence[Trajectory]) -> list[Place]:
    return [(batch, call) for batch in batches for call in range(batch.steps)]


def _schedule(settings: RetrainSettings) -> Callable[[int], float]:
    """Step -> the factor of the learning rate; the optimiser of the schedule is a stand-in."""
    nothing = torch.optim.SGD([torch.zeros(1)])
    warmup = round(settings.warmup * settings.steps)
    return get_cosine_schedule_with_warmup(nothing, warmup, settings.steps).lr_lambdas[0]


def _optimiser(settings: RetrainSettings, parameters: Parameters) -> torch.optim.Optimizer:
    """No weight decay: it would pull the weights towards zero, with no gradient at all."""
    options = {"lr": settings.lr, "weight_decay": 0.0}
    if settings.optimiser == "adamw":
        return torch.optim.AdamW(parameters.values(), **options)
    try:
        from torchao.optim import AdamW8bit
    except ModuleNotFoundError as error:
        raise UserError(
            "retrain: optimiser: adamw8bit needs torchao; pip install torchao"
        ) from error
    made = AdamW8bit(parameters.values(), **options, bf16_stochastic_round=True)
    if next(iter(parameters.values())).device.type == "cpu":
        made.step = _eager(made.step)
    return made


def _eager(function: Callable[[], None]) -> Callable[[], None]:
    """Without what torchao compiles at its first step, which takes a compiler and a minute."""

    @wraps(function)
    def called() -> None:
        with torch.compiler.set_stance("force_eager"):
            function()

    return called


@contextmanager
def _drawing(seed: int, device: torch.device) -> Iterator[None]:
    """What is drawn inside, as by stochastic rounding, comes from a seed of its own."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        yield
