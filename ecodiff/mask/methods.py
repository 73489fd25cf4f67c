"""The methods: what each needs, and the scores it gives. All that comes after is shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from diffusers import DiffusionPipeline
from torch import Tensor

from ecodiff.calibrate import Calibration, gather_grams
from ecodiff.config.sections import MaskSettings
from ecodiff.mask import learn, peers, scores
from ecodiff.mask.sensitivity import closed_means, costs_of_share, sensitivity
from ecodiff.models.structures import count_parameters, denoiser_of, discover
from ecodiff.runtime.errors import UserError

PUBLISHED = {"first_logit": 3.0, "closed": "zero"}  # how the paper learns
# Methods that score what closing a gate does; others score what lies behind it.
GATED = ("ecodiff", "sensitivity")

Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Request:
    """What a method may need; see `score` and `make_mask`."""

    seed: int
    settings: MaskSettings
    calibration: Calibration | None = None
    sparsity: float | None = None
    scratch: Path | None = None

    def recorded(self, method: str) -> Calibration:
        """The calibration, of the prompts that are to be used; `UserError` without one."""
        if self.calibration is None:
            raise UserError(f"method {method}: needs a calibration of this model")
        return self.calibration.first(self.settings.prompts)


Method = Callable[[DiffusionPipeline, Request], tuple[Scores, pd.DataFrame]]


def scored(pipe: DiffusionPipeline, method: str, request: Request) -> tuple[Scores, pd.DataFrame]:
    """The scores of a method, and the history of its learning; no rows when it does not learn."""
    if method not in METHODS:
        raise UserError(f"method: {method!r} is not one of {', '.join(METHODS)}")
    return METHODS[method](pipe, request)


def _learned(pipe: DiffusionPipeline, request: Request) -> tuple[Scores, pd.DataFrame]:
    calibration = request.recorded("ecodiff")
    if request.settings.objective == "budget" and request.sparsity is None:
        raise UserError("method ecodiff: the objective budget needs a sparsity to aim at")
    target = request.sparsity or 0.0
    return learn.learn_mask(pipe, calibration, request.settings, target, request.scratch)


def _learned_with(**settings: Any) -> Method:
    """Learning with some settings fixed."""
    return lambda pipe, request: _learned(
        pipe, replace(request, settings=request.settings.model_copy(update=settings))
    )


def _at_once(find: Callable[[DiffusionPipeline, Request], Scores]) -> Method:
    """A method that learns nothing, so that its history has no rows."""
    return lambda pipe, request: (find(pipe, request), pd.DataFrame(columns=list(learn.COLUMNS)))


def _sensitivity(pipe: DiffusionPipeline, request: Request) -> Scores:
    calibration, settings = request.recorded("sensitivity"), request.settings
    how = (settings.batch, settings.checkpoint, settings.seed)
    found = sensitivity(pipe, calibration, *how, means=closed_means(settings, calibration))
    denoiser = denoiser_of(pipe)
    return costs_of_share(discover(denoiser), found, count_parameters(denoiser))


def _magnitude(pipe: DiffusionPipeline, request: Request) -> Scores:
    return scores.magnitude(denoiser_of(pipe), discover(pipe))


def _magnitude_local(pipe: DiffusionPipeline, request: Request) -> Scores:
    return scores.ranks(_magnitude(pipe, request))


def _random(pipe: DiffusionPipeline, request: Request) -> Scores:
    return scores.random(discover(pipe), request.seed)


def _taylor(pipe: DiffusionPipeline, request: Request) -> Scores:
    calibration = request.recorded("taylor")
    return peers.taylor(pipe, calibration, request.settings.batch, request.seed)


def _wanda(pipe: DiffusionPipeline, request: Request) -> Scores:
    structures, calibration = discover(pipe), request.recorded("wanda")
    grams = gather_grams(pipe, structures, calibration, request.settings.batch)
    return peers.wanda(denoiser_of(pipe), structures, grams)


def _obs(pipe: DiffusionPipeline, request: Request) -> Scores:
    structures, calibration = discover(pipe), request.recorded("obs")
    grams = gather_grams(
        pipe, structures, calibration, request.settings.batch, peers.decreasing_weight
    )
    return peers.obs(denoiser_of(pipe), structures, grams)


def _depth(pipe: DiffusionPipeline, request: Request) -> Scores:
    return peers.depth(pipe, request.recorded("depth"), request.settings.batch)


METHODS: dict[str, Method] = {
    "ecodiff": _learned,
    "sensitivity": _at_once(_sensitivity),
    "flat-start": _learned_with(**PUBLISHED),
    "per-step": _learned_with(**PUBLISHED, loss="per-step"),
    "obs": _at_once(_obs),
    "wanda": _at_once(_wanda),
    "taylor": _at_once(_taylor),
    "depth": _at_once(_depth),
    "magnitude": _at_once(_magnitude),
    "magnitude-local": _at_once(_magnitude_local),
    "random": _at_once(_random),
}
