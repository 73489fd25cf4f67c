"""Masks: which units of a denoiser stay, by any method that gives each unit a score."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ecodiff.calibrate import Calibration, calibrate
from ecodiff.config.methods import METHODS
from ecodiff.config.sections import MaskSettings
from ecodiff.mask.methods import Request, Scores, scored
from ecodiff.mask.select import check_scores, limits_of, removed_share, select
from ecodiff.mask.sensitivity import closed_means
from ecodiff.models.identity import OLD, same_denoiser
from ecodiff.models.pipelines import check_fingerprint, fingerprint, name_of
from ecodiff.models.pruned import Pruned
from ecodiff.models.structures import count_parameters, denoiser_of, discover
from ecodiff.runtime.artifacts import atomic
from ecodiff.runtime.errors import UserError

__all__ = ["Mask", "learn_mask", "make_mask", "score", "select"]


@dataclass
class Mask:
    """Scores, the units that stay, and where both come from.

    Attributes:
        scores: structure name -> fp32 (units,), higher is more important.
        kept: structure name -> bool (units,), true for units that stay.
        fingerprint: of the dense model, see `pipelines.fingerprint`.
        info: model, method, target, exact sparsity, settings, and of methods that look at a
            calibration its call, prompts and seeds; anything that JSON can hold.
        means: what biases give in the place of units that go, see `Calibration`; none: nothing.
        file: what errors call it.
    """

    scores: dict[str, Tensor]
    kept: dict[str, Tensor]
    fingerprint: str
    info: dict[str, Any] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    file: str = "mask"

    def check(self, pipe: DiffusionPipeline) -> None:
        """Raise `UserError` unless this is of the dense model `pipe`, with all its structures."""
        # Whatever the scheduler: it may be swapped between learning and pruning.
        check_fingerprint(self.file, self.fingerprint, fingerprint(pipe), pipe, same_denoiser)
        structures = discover(pipe)
        check_scores(structures, self.scores)
        check_scores(structures, {name: value.float() for name, value in self.kept.items()})

    def at(self, pipe: DiffusionPipeline, sparsity: float) -> Mask:
        """The mask of another sparsity by the same scores, selected by the same settings.

        Right unless the scores were learned for one sparsity alone. Raises what `check` and
        `select` do.
        """
        self.check(pipe)
        settings = MaskSettings.model_validate(self.info["settings"])
        found = _selected(pipe, self.scores, sparsity, settings, self.info)
        return replace(self, kept=found.kept, info=found.info)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {f"scores/{name}": v.float().contiguous() for name, v in self.scores.items()}
        tensors |= {f"kept/{name}": value.contiguous() for name, value in self.kept.items()}
        tensors |= {f"means/{name}": value.contiguous() for name, value in self.means.items()}
        with atomic(path) as scratch:
            info = json.dumps(self.info, default=str)
            metadata = {"ecodiff": info, "fingerprint": self.fingerprint}
            save_file(tensors, scratch, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Raises `UserError` when the file is missing, old or not one."""
        parts: dict[str, dict[str, Tensor]] = {"scores": {}, "kept": {}, "means": {}}
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                info = json.loads(metadata["ecodiff"])
                for key in file.keys():  # noqa: SIM118
                    part, _, name = key.partition("/")
                    parts[part][name] = file.get_tensor(key)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: missing, truncated or not a mask of ecodiff") from error
        if "fingerprint" not in metadata:
            raise UserError(f"{path}: {OLD}")
        return cls(**parts, info=info, fingerprint=metadata["fingerprint"], file=str(path))


def score(
    pipe: DiffusionPipeline,
    method: str,
    *,
    seed: int = 0,
    calibration: Calibration | None = None,
    settings: MaskSettings | None = None,
    sparsity: float | None = None,
) -> Scores:
    """Score every unit with a method of `config.methods.METHODS`.

    Args:
        seed: of `random` and `taylor`.
        calibration: what `calibrate` recorded of this model, for methods that look at it.
        settings: how to learn, for methods that do, and how gates close; the seed in them counts
            for `sensitivity` too. The others read the batch size and the number of prompts.
        sparsity: what to aim at, for methods that learn with the objective `budget`.

    Returns:
        Structure name -> fp32 (units,), higher is more important.

    Raises:
        UserError: an unknown method, or something that the method needs is missing.
    """
    _refuse_pruned(pipe)
    request = Request(seed, settings or MaskSettings(), calibration, sparsity)
    return scored(pipe, method, request)[0]


def make_mask(
    pipe: DiffusionPipeline,
    method: str,
    sparsity: float,
    *,
    calibration: Calibration | None = None,
    settings: MaskSettings | None = None,
    scratch: Path | None = None,
) -> tuple[Mask, pd.DataFrame]:
    """Score with a method, then select: the mask and the history (no rows for baselines).

    `settings` also says how to select (`scope`, `min_units`, `align`) and seeds `random`. `scratch`
    holds the state of unfinished learning, see `learn.learn_mask`. Raises what `score` and `select`
    do.
    """
    settings = settings or MaskSettings()
    denoiser = denoiser_of(pipe)
    _refuse_pruned(pipe)
    if calibration is not None:
        calibration.check(pipe)
    nothing = {s.name: torch.zeros(s.units) for s in discover(denoiser)}
    # Fails before hours of learning, not after, when the sparsity cannot be reached.
    _selected(pipe, nothing, sparsity, settings)
    request = Request(settings.seed, settings, calibration, sparsity, scratch)
    found, history = scored(pipe, method, request)
    info = {
        "model": denoiser.config.get("_name_or_path") or type(pipe).__name__,
        "method": method,
        "scored_for": sparsity,
        "settings": settings.model_dump(),
    }
    if calibration is not None:
        info |= {key: getattr(calibration, key) for key in ("call", "prompts", "seeds")}
    mask = _selected(pipe, found, sparsity, settings, info)
    if METHODS[method].closes_on_means and calibration is not None:
        mask.means = dict(closed_means(settings, calibration))
    return mask, history


def learn_mask(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    sparsity: float = 0.2,
    *,
    seeds: Sequence[int] | None = None,
    call: dict[str, Any] | None = None,
    settings: MaskSettings | None = None,
) -> Mask:
    """Calibrate on prompts, learn (EcoDiff) and select, in one go.

    Args:
        pipe: the dense pipeline.
        prompts: calibration captions; a hundred do.
        sparsity: share of the denoiser's parameters to remove.
        seeds: of the starting noise, a different one a prompt; 0, 1, 2, ... by default.
        call: how to call the pipeline; its own defaults otherwise.
        settings: how to learn.
    """
    settings = settings or MaskSettings()
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    calibration = calibrate(pipe, list(prompts), seeds, call or {}, settings.batch)
    return make_mask(pipe, "ecodiff", sparsity, calibration=calibration, settings=settings)[0]


def _selected(
    pipe: DiffusionPipeline,
    found: Scores,
    sparsity: float,
    settings: MaskSettings,
    info: Mapping[str, Any] = MappingProxyType({}),
) -> Mask:
    """The mask that scores give at a sparsity; `info` is completed."""
    denoiser = denoiser_of(pipe)
    structures, total = discover(denoiser), count_parameters(denoiser)
    kept = select(structures, found, sparsity, total, **limits_of(settings))
    exact = removed_share(structures, kept, total)
    info = {**info, "target": sparsity, "sparsity": exact, "parameters": total}
    return Mask(found, kept, fingerprint(pipe), info)


def _refuse_pruned(pipe: DiffusionPipeline) -> None:
    if isinstance(denoiser_of(pipe), Pruned):
        raise UserError(f"mask: {name_of(pipe)} is pruned already; masks are of dense models")
