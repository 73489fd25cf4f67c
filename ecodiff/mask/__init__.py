"""Masks: which units of a denoiser stay. Any method that gives each unit a score can make one."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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
from ecodiff.config.reading import read_settings
from ecodiff.config.sections import MaskSettings
from ecodiff.mask.methods import Request, Scores, scored
from ecodiff.mask.prices import Prices, budgeted, prices_of
from ecodiff.mask.select import check_scores, limits_of, removed_share, select
from ecodiff.mask.sensitivity import closed_means
from ecodiff.models.identity import OLD, same_denoiser
from ecodiff.models.pipelines import check_fingerprint, fingerprint
from ecodiff.models.structures import (
    count_parameters,
    denoiser_of,
    discover,
    maskable_share,
    modulation_of,
)
from ecodiff.models.units import Structure
from ecodiff.runtime.artifacts import atomic
from ecodiff.runtime.errors import UserError
from ecodiff.trajectory.directions import bases_of, tied, untied
from ecodiff.trajectory.gates import Gates

log = logging.getLogger(__name__)

__all__ = ["Mask", "learn_mask", "make_mask", "score", "select"]


@dataclass
class Mask:
    """Scores, the units that stay, and how both were made.

    Attributes:
        scores: structure name -> fp32 (units,), higher is more important.
        kept: structure name -> bool (units,), true for units that stay.
        fingerprint: of the dense model, see `pipelines.fingerprint`.
        info: model, method, target and exact sparsity, settings, and of methods that look at a
            calibration its call, prompts and seeds; values must be JSON.
        means: module name -> mean activation that a bias supplies once units are removed, see
            `Calibration.means`. Empty: removed units contribute 0.
        moments: linear name -> second moments of its input, whose directions are the units of
            modulation by rank, see `Calibration.moments`. Empty: modulation goes by channels.
        file: what errors call it.
    """

    scores: dict[str, Tensor]
    kept: dict[str, Tensor]
    fingerprint: str
    info: dict[str, Any] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    file: str = "mask"

    def check(self, pipe: DiffusionPipeline) -> None:
        """Raise `UserError` unless this is of the dense model `pipe`, with all its structures."""
        # Whatever the scheduler: it may be swapped between learning and pruning.
        check_fingerprint(self.file, self.fingerprint, fingerprint(pipe), pipe, same_denoiser)
        structures = discover(pipe, modulation_of(self.scores))
        check_scores(structures, self.scores)
        check_scores(structures, {name: value.float() for name, value in self.kept.items()})

    def gates(self, pipe: DiffusionPipeline) -> Gates:
        """Gates on the dense model `pipe` that close as this mask's units go."""
        denoiser = denoiser_of(pipe)
        structures = discover(denoiser, modulation_of(self.scores))
        bases = bases_of(denoiser, structures, self.moments)
        return Gates(structures, means=self.means, bases=bases).to(denoiser.device)

    def at(self, pipe: DiffusionPipeline, sparsity: float) -> Mask:
        """The mask for another sparsity: the same scores ranked again, with the same settings.

        Scores that were learned for one sparsity are usable at others but were not optimised for
        them. Raises what `check` and `select` do.
        """
        self.check(pipe)
        settings = MaskSettings.model_validate(self.info["settings"])
        found = selected(pipe, self.scores, sparsity, settings, self.info)
        return replace(self, kept=found.kept, info=found.info)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file atomically."""
        tensors = {f"scores/{name}": v.float().contiguous() for name, v in self.scores.items()}
        tensors |= {f"kept/{name}": value.contiguous() for name, value in self.kept.items()}
        tensors |= {f"means/{name}": value.contiguous() for name, value in self.means.items()}
        moments, names = untied(self.moments)
        tensors |= {f"moments/{name}": value.contiguous() for name, value in moments.items()}
        with atomic(path) as scratch:
            info = json.dumps(self.info, default=str)
            metadata = {"ecodiff": info, "fingerprint": self.fingerprint}
            metadata["moments"] = json.dumps(names)
            save_file(tensors, scratch, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Raises `UserError` when the file is missing, old or not one."""
        kinds = ("scores", "kept", "means", "moments")
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                info = json.loads(metadata["ecodiff"])
                for key in file.keys():  # noqa: SIM118
                    part, _, name = key.partition("/")
                    parts[part][name] = file.get_tensor(key)
            names = json.loads(metadata.get("moments", "{}"))
            parts["moments"] = tied(parts["moments"], names)
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
    settings: MaskSettings | Mapping[str, Any] | None = None,
    sparsity: float | None = None,
) -> Scores:
    """Score every unit with one method.

    Args:
        pipe: the dense pipeline.
        method: a key of `config.methods.METHODS`.
        seed: for `random` and `taylor`.
        calibration: what `calibrate` recorded of this model; needed by methods that look at it.
        settings: the `mask` section. Methods that learn read all of it; `sensitivity` reads batch,
            prompts, seed, checkpoint, closed and modulation; the others batch.
        sparsity: target of the objective `budget`; needed by methods that learn with it.

    Returns:
        Structure name -> fp32 (units,), higher is more important.

    Raises:
        UserError: an unknown method, or no calibration or sparsity where the method needs one.
    """
    request = Request(seed, read_settings(MaskSettings, settings), calibration, sparsity)
    return scored(pipe, method, request)[0]


def make_mask(
    pipe: DiffusionPipeline,
    method: str,
    sparsity: float,
    *,
    calibration: Calibration | None = None,
    settings: MaskSettings | Mapping[str, Any] | None = None,
    scratch: Path | None = None,
) -> tuple[Mask, pd.DataFrame]:
    """Score all units with a method, then select those that stay at a sparsity.

    Args:
        pipe: the dense pipeline.
        method: a key of `config.methods.METHODS`.
        sparsity: share of the denoiser's parameters to remove, or of another budget.
        calibration: what `calibrate` recorded of this model; needed by methods that look at it.
        settings: the `mask` section: how to score, how to select (`scope`, `min_units`, `align`),
            and the seed.
        scratch: file for the state of unfinished learning, see `learn.learn_mask`.

    Returns:
        The mask, and the history of learning (no rows when the method does not learn).

    Raises:
        UserError: what `score` and `select` raise.
    """
    settings = read_settings(MaskSettings, settings)
    denoiser = denoiser_of(pipe)
    if calibration is not None:
        calibration.check(pipe)
    by_rank = method in METHODS and METHODS[method].by_rank and settings.modulation == "rank"
    structures = discover(pipe, "rank" if by_rank else "channels")
    prices = prices_of(pipe, structures, settings.budget, calibration)
    _check_target(pipe, sparsity, settings, structures, prices)
    request = Request(settings.seed, settings, calibration, sparsity, scratch, prices)
    found, history = scored(pipe, method, request)
    info = {
        "model": denoiser.config.get("_name_or_path") or type(pipe).__name__,
        "method": method,
        "scored_for": sparsity,
        "settings": settings.model_dump(),
        "prices": asdict(prices) if prices else None,
    }
    if calibration is not None:
        info |= {key: getattr(calibration, key) for key in ("call", "prompts", "seeds")}
    mask = selected(pipe, found, sparsity, settings, info)
    if METHODS[method].closes_on_means and calibration is not None:
        mask.means = dict(closed_means(settings, calibration))
        if modulation_of(found) == "rank":
            mask.moments = dict(calibration.moments)
    return mask, history


def learn_mask(
    pipe: DiffusionPipeline,
    prompts: str | Sequence[str],
    sparsity: float = 0.2,
    *,
    seeds: Sequence[int] | None = None,
    call: Mapping[str, Any] | None = None,
    settings: MaskSettings | Mapping[str, Any] | None = None,
) -> Mask:
    """Calibrate on prompts, learn a mask (EcoDiff) and select the units that stay.

    Args:
        pipe: the dense pipeline.
        prompts: captions of the calibration set, or a single one; the paper uses 100.
        sparsity: share of the denoiser's parameters to remove.
        seeds: seeds of the starting noise, one per prompt, all different; default 0, 1, 2, ...
        call: arguments of the pipeline's call, such as `num_inference_steps`, `guidance_scale`,
            `height` and `width`; the pipeline's own defaults otherwise.
        settings: the `mask` section, or a mapping of some of its keys; its defaults otherwise.

    Raises:
        UserError: what `calibrate`, `score` and `select` raise, all before anything is computed
            but for values that are not finite.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not isinstance(settings, MaskSettings):  # a batch that nobody asked for fits the prompts
        settings = {"batch": max(1, min(MaskSettings().batch, len(prompts))), **(settings or {})}
    settings = read_settings(MaskSettings, settings)
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    if settings.budget == "parameters":  # others are known after the calibration
        _check_target(pipe, sparsity, settings, discover(pipe, settings.modulation))
    calibration = calibrate(pipe, prompts, seeds, dict(call or {}), settings.batch)
    return make_mask(pipe, "ecodiff", sparsity, calibration=calibration, settings=settings)[0]


def _check_target(
    pipe: DiffusionPipeline,
    sparsity: float,
    settings: MaskSettings,
    structures: Sequence[Structure],
    prices: Prices | None = None,
) -> None:
    """Fails before hours of learning, not after, when the sparsity cannot be reached."""
    nothing = {s.name: torch.zeros(s.units) for s in structures}
    selected(pipe, nothing, sparsity, settings, {"prices": asdict(prices) if prices else None})
    total = prices.total if prices else count_parameters(denoiser_of(pipe))
    most = maskable_share(prices.applied(structures) if prices else structures, total)
    log.info("mask: up to %.1f %% of the denoiser's %s can go", 100 * most, settings.budget)


def selected(
    pipe: DiffusionPipeline,
    found: Scores,
    sparsity: float,
    settings: MaskSettings,
    info: Mapping[str, Any] = MappingProxyType({}),
) -> Mask:
    """The mask that scores give at a sparsity; adds target, sparsity and parameters to `info`."""
    denoiser = denoiser_of(pipe)
    prices = Prices(**info["prices"]) if info.get("prices") else None
    structures, total = budgeted(pipe, modulation_of(found), prices)
    kept = select(structures, found, sparsity, total, **limits_of(settings))
    exact = removed_share(structures, kept, total)
    info = {**info, "target": sparsity, "sparsity": exact, "parameters": count_parameters(denoiser)}
    return Mask(found, kept, fingerprint(pipe), info)
