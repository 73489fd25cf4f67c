"""The functions of the methods that `config.methods` declares: each scores all units.

What follows a score (selection, pruning, compensation) is the same for all methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ecodiff.calibrate import Calibration
from ecodiff.calibrate.grams import Grams, gather_grams, in_parts
from ecodiff.config.methods import METHODS
from ecodiff.config.sections import MaskSettings
from ecodiff.mask import learn, peers, scores
from ecodiff.mask.prices import Prices, budgeted
from ecodiff.mask.sensitivity import closed_means, costs_of_share, sensitivity
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.models.units import Structure
from ecodiff.runtime.errors import UserError

Scores = dict[str, Tensor]
# As in the paper: all logits start at one value, and a closed gate gives 0.
PUBLISHED = {"first_logit": 3.0, "closed": "zero", "modulation": "channels"}


@dataclass(frozen=True)
class Request:
    """What a method may need.

    Attributes:
        seed: of random scores and noise.
        settings: the `mask` section.
        calibration: what `calibrate` recorded of the model.
        sparsity: target of the objective `budget`.
        scratch: file for the state of unfinished learning.
        prices: of the units, where the budget is not parameters.
    """

    seed: int
    settings: MaskSettings
    calibration: Calibration | None = None
    sparsity: float | None = None
    scratch: Path | None = None
    prices: Prices | None = None

    def recorded(self) -> Calibration:
        """The calibration."""
        assert self.calibration is not None, "`scored` asks for it"
        return self.calibration

    def but(self, **settings: Any) -> Request:
        """A copy with some settings changed."""
        return replace(self, settings=self.settings.model_copy(update=settings))


def scored(pipe: DiffusionPipeline, name: str, request: Request) -> tuple[Scores, pd.DataFrame]:
    """Run a method.

    Args:
        pipe: the dense pipeline.
        name: a key of `config.methods.METHODS`.
        request: what the method may need.

    Returns:
        Structure name -> fp32 (units,), higher is more important, as ranks within the structure
        where the method's units compete there. And the history of learning; no rows when the
        method does not learn.

    Raises:
        UserError: there is no such method, or it needs a calibration and there is none.
    """
    if name not in METHODS:
        raise UserError(f"method: {name!r} is not one of {', '.join(METHODS)}")
    method = METHODS[name]
    if method.looks_at == "calibration" and request.calibration is None:
        raise UserError(f"method {name}: needs a calibration of this model")
    module, _, function = method.function.partition(":")
    found = getattr(import_module(module), function)(pipe, request)
    found, history = found if method.learns else (found, pd.DataFrame(columns=list(learn.COLUMNS)))
    return scores.ranks(found) if method.ranks == "structure" else found, history


def learned(pipe: DiffusionPipeline, request: Request) -> tuple[Scores, pd.DataFrame]:
    """Logits of learned gates, see `learn.learn_mask`; `UserError` without a sparsity to aim at."""
    if request.settings.objective == "budget" and request.sparsity is None:
        raise UserError("method ecodiff: the objective budget needs a sparsity to aim at")
    return learn.learn_mask(
        pipe,
        request.recorded(),
        request.settings,
        request.sparsity or 0.0,
        request.scratch,
        request.prices,
    )


def learned_from_a_flat_start(
    pipe: DiffusionPipeline, request: Request
) -> tuple[Scores, pd.DataFrame]:
    """Learning as in the paper: one initial logit for all units, closed gates give 0."""
    return learned(pipe, request.but(**PUBLISHED))


def learned_a_step_at_a_time(
    pipe: DiffusionPipeline, request: Request
) -> tuple[Scores, pd.DataFrame]:
    """The paper's ablation "per-step loss", from the paper's start."""
    return learned(pipe, request.but(**PUBLISHED, loss="per-step"))


def sensitivities(pipe: DiffusionPipeline, request: Request) -> Scores:
    """Sensitivity divided by the unit's share of the parameters, see `sensitivity.costs_of_share`;
    it is also where learning starts by default."""
    settings = request.settings
    calibration = request.recorded().first(settings.prompts)
    found = sensitivity(
        pipe,
        calibration,
        batch=settings.batch,
        checkpoint=settings.checkpoint,
        seed=settings.seed,
        means=closed_means(settings, calibration),
        modulation=settings.modulation,
    )
    structures, total = budgeted(pipe, settings.modulation, request.prices)
    return costs_of_share(structures, found, total)


def magnitude(pipe: DiffusionPipeline, request: Request) -> Scores:
    """See `scores.magnitude`."""
    return scores.magnitude(denoiser_of(pipe), discover(pipe))


def random(pipe: DiffusionPipeline, request: Request) -> Scores:
    """See `scores.random`."""
    return scores.random(discover(pipe), request.seed)


def taylor(pipe: DiffusionPipeline, request: Request) -> Scores:
    """See `peers.taylor`."""
    return peers.taylor(pipe, request.recorded(), request.settings.batch, request.seed)


def wanda(pipe: DiffusionPipeline, request: Request) -> Scores:
    """See `peers.wanda`."""
    return _in_parts(pipe, request, peers.wanda)


def obs(pipe: DiffusionPipeline, request: Request) -> Scores:
    """See `peers.obs`."""
    return _in_parts(pipe, request, peers.obs, peers.decreasing_weight)


def obs_of_inner_blocks(pipe: DiffusionPipeline, request: Request) -> Scores:
    """See `peers.obs` and `peers.inner_blocks`."""
    return peers.inner_blocks(obs(pipe, request))


def depth(pipe: DiffusionPipeline, request: Request) -> Scores:
    """See `peers.depth`."""
    return peers.depth(pipe, request.recorded(), request.settings.batch)


def _in_parts(
    pipe: DiffusionPipeline,
    request: Request,
    score: Callable[[nn.Module, Sequence[Structure], Grams], Scores],
    *weight: Callable[[int, int], float],
) -> Scores:
    """Scores from second moments, of as many structures at a time as have room for theirs."""
    structures, found = discover(pipe), dict[str, Tensor]()
    for part in in_parts(pipe, structures):
        grams = gather_grams(pipe, part, request.recorded(), request.settings.batch, *weight)
        found |= score(denoiser_of(pipe), part, grams)
    return {s.name: found[s.name] for s in structures}
