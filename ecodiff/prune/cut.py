"""Cut the units that a mask removes out of a pipeline's denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ecodiff.calibrate import Calibration, Grams
from ecodiff.config.sections import PruneSettings
from ecodiff.models.pipelines import fingerprint
from ecodiff.models.pruned import Pruned, pruned_class
from ecodiff.models.structures import Structure, denoiser_of, discover
from ecodiff.prune.compensate import compensate
from ecodiff.prune.in_groups import compensate_in_groups
from ecodiff.prune.means import leave_means, of_modulation
from ecodiff.prune.narrow import narrow
from ecodiff.runtime.errors import UserError

if TYPE_CHECKING:
    from ecodiff.mask import Mask


def prune(
    pipe: DiffusionPipeline,
    mask: Mask | Mapping[str, Tensor],
    data: Grams | Calibration | None = None,
    settings: PruneSettings | None = None,
) -> None:
    """Remove the units that the mask doesn't keep, in place (EcoDiff, "structural pruning").

    The pruned model computes what the dense one does under 0/1 gates, unless `data` is given: then
    consumers are solved again, and modulation that goes gives its mean. Its denoiser becomes an
    `ecodiff.Pruned<Class>`.

    Args:
        pipe: a dense pipeline.
        mask: a `Mask`, or structure name -> bool (units,), true for units that stay. Structures
            that are not named stay whole.
        data: re-solve the surviving weights: by the dense model's `Grams` all at once, see
            `compensate`; by a `Calibration` in groups, see `in_groups`.
        settings: how.

    Raises:
        UserError: the denoiser is pruned already, mask or data are of another model, or a mapping
            doesn't fit its structures.
    """
    denoiser = denoiser_of(pipe)
    if isinstance(denoiser, Pruned):
        raise UserError("the denoiser is pruned already; prune the dense model with a larger mask")
    if not isinstance(mask, Mapping):
        mask.check(pipe)
    structures, dense = discover(denoiser), fingerprint(pipe)
    kept = _kept_units(structures, getattr(mask, "kept", mask))
    settings = settings or PruneSettings()
    if isinstance(data, Calibration):
        compensate_in_groups(
            pipe,
            structures,
            kept,
            data,
            groups=settings.groups,
            ridge=settings.ridge,
            batch_size=settings.batch_size,
        )
    elif data is not None:
        data.check(pipe)
        compensate(denoiser, structures, kept, data, settings.ridge)
    # What is solved again has a constant of its own.
    means = getattr(mask, "means", {}) if data is None else of_modulation(structures, data.means)
    leave_means(denoiser, structures, kept, means)
    record = narrow(denoiser, structures, kept)
    denoiser.__class__ = pruned_class(type(denoiser))
    denoiser.register_to_config(pruned={**record, "dense": dense})
    # The pipeline recorded the dense class; setting the component records the new one.
    name = next(n for n, component in pipe.components.items() if component is denoiser)
    setattr(pipe, name, denoiser)


def _kept_units(structures: Sequence[Structure], mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the indices of the units that stay, of those structures that lose any."""
    sizes = {s.name: s.units for s in structures}
    kept = {}
    for name, stays in mask.items():
        if name not in sizes:
            raise UserError(f"mask: {name} is not a structure of this model")
        if stays.dtype != torch.bool or stays.shape != (sizes[name],):
            found = f"{stays.dtype} {tuple(stays.shape)}"
            raise UserError(f"mask: {name}: is {found}, must be bool of ({sizes[name]},)")
        if not stays.all():
            kept[name] = stays.nonzero().flatten().cpu()
    return kept
