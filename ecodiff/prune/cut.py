"""Cut the units that a mask removes out of a pipeline's denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ecodiff.calibrate import Calibration
from ecodiff.calibrate.grams import Grams
from ecodiff.config.reading import read_settings
from ecodiff.config.sections import PruneSettings
from ecodiff.models.libraries import plain, refuse_offloaded
from ecodiff.models.pipelines import fingerprint
from ecodiff.models.pruned import Pruned, pruned_class
from ecodiff.models.structures import denoiser_of, discover, modulation_of
from ecodiff.models.units import Structure
from ecodiff.prune.compensate import compensate
from ecodiff.prune.factorise import factorise
from ecodiff.prune.in_groups import compensate_in_groups
from ecodiff.prune.means import leave_means, of_modulation
from ecodiff.prune.narrow import narrow
from ecodiff.runtime.errors import UserError
from ecodiff.trajectory.directions import bases_of

if TYPE_CHECKING:
    from ecodiff.mask import Mask


def prune(
    pipe: DiffusionPipeline,
    mask: Mask | Mapping[str, Tensor],
    data: Grams | Calibration | None = None,
    settings: PruneSettings | Mapping[str, Any] | None = None,
) -> None:
    """Remove the units that the mask doesn't keep, in place (EcoDiff, "structural pruning").

    Without `data` the pruned model computes exactly what the dense one computes with the mask as
    0/1 gates. With `data`, surviving weights of consumers are re-solved by least squares, and
    removed modulation channels give their calibration mean. The denoiser's class becomes
    `ecodiff.Pruned<Class>`. A pruned pipeline may be pruned again, with a mask that was made of it.

    Args:
        pipe: the pipeline.
        mask: a `Mask`, or structure name -> bool (units,), true for units that stay. Structures
            that are not named stay whole.
        data: what to compensate with: the dense model's `Grams` solve all linears at once, see
            `compensate`; a `Calibration` solves them in groups, see `in_groups`. None: no
            compensation.
        settings: ridge, groups and batch size of the compensation.

    Raises:
        UserError: the denoiser is offloaded, mask or data are of another model, or a mapping
            doesn't fit its structures.
    """
    denoiser = denoiser_of(pipe)
    refuse_offloaded(denoiser, "prune")
    kept = getattr(mask, "kept", mask)
    if not isinstance(kept, Mapping):
        hint = "; ecodiff.Mask.load reads a file" if isinstance(mask, str | Path) else ""
        raise UserError(f"mask: {mask!r} is not a mask{hint}")
    if not isinstance(mask, Mapping):
        mask.check(pipe)
    structures, dense = discover(denoiser, modulation_of(kept)), fingerprint(pipe)
    kept = _kept_units(structures, kept)
    bases = bases_of(denoiser, structures, getattr(mask, "moments", {}), kept)
    settings = read_settings(PruneSettings, settings)
    if isinstance(data, Calibration):
        compensate_in_groups(
            pipe,
            structures,
            kept,
            data,
            groups=settings.groups,
            ridge=settings.ridge,
            batch_size=settings.batch_size,
            bases=bases,
        )
    elif data is not None:
        data.check(pipe)
        compensate(denoiser, structures, kept, data, settings.ridge)
    # Least squares solves for the biases of consumers itself, so only the means of modulation
    # linears, which it does not touch, are left to set.
    means = getattr(mask, "means", {}) if data is None else of_modulation(structures, data.means)
    leave_means(denoiser, structures, kept, means)
    before = denoiser.config["pruned"] if isinstance(denoiser, Pruned) else {"dense": dense}
    record = {**before, **narrow(denoiser, structures, kept, before)}
    ranks = factorise(denoiser, structures, kept, bases)
    record["ranks"] = {**before.get("ranks", {}), **ranks}
    if not isinstance(denoiser, Pruned):
        denoiser.__class__ = pruned_class(type(denoiser))
    denoiser.register_to_config(pruned=record)
    # The pipeline's config names the dense class; setting the component records the new one.
    name = next(n for n, component in pipe.components.items() if plain(component) is denoiser)
    setattr(pipe, name, denoiser)


def _kept_units(structures: Sequence[Structure], mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Structure name -> int64 indices of the units that stay; only structures that lose units."""
    sizes = {s.name: s.units for s in structures}
    together = {s.name: s.together for s in structures}
    kept = {}
    for name, stays in mask.items():
        if name not in sizes:
            raise UserError(f"mask: {name} is not a structure of this model")
        if not isinstance(stays, Tensor):
            raise UserError(f"mask: {name}: is a {type(stays).__name__}, must be a bool tensor")
        if stays.dtype != torch.bool or stays.shape != (sizes[name],):
            found = f"{stays.dtype} {tuple(stays.shape)}"
            raise UserError(f"mask: {name}: is {found}, must be bool of ({sizes[name]},)")
        gone = int((~stays).sum())
        if 0 < gone < together[name]:
            most = sizes[name] - together[name]
            raise UserError(
                f"mask: {name}: a rank of {sizes[name] - gone} does not pay; keep at most {most}"
                f" directions, or all {sizes[name]}"
            )
        if not stays.all():
            kept[name] = stays.nonzero().flatten().cpu()
    return kept
