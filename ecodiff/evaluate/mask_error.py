"""How far masks move the final latents: before anything is cut, drawn or saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from diffusers import DiffusionPipeline

from ecodiff.calibrate import Calibration
from ecodiff.mask import Mask
from ecodiff.models.calls import why_not_finite
from ecodiff.models.structures import denoiser_of
from ecodiff.runtime.errors import UserError

COLUMNS = ("mask", "sparsity", "latent_error", "median_error")


def mask_error(
    pipe: DiffusionPipeline,
    record: Calibration,
    masks: Mapping[str, Mask],
    sparsities: Sequence[float],
    batch_size: int,
) -> pd.DataFrame:
    """The relative latent error of masked models (EcoDiff, objective), as if they had been pruned.

    Args:
        pipe: the dense pipeline.
        record: its latents on prompts that the masks have not seen.
        masks: name -> mask; its scores are ranked at each sparsity.
        sparsities: shares of the denoiser's parameters.
        batch_size: prompts that run together.

    Returns:
        A row a mask and sparsity: mask, sparsity, latent_error = mean((z0' - z0)^2) / var(z0), and
        median_error, the median over prompts of each one's. The mean is ruled by the few pictures
        that turn out as something else, so among good masks it is chance; the median is not.

    Raises:
        UserError: record or mask are of another model, a sparsity cannot be reached, or an error is
            not finite.
    """
    record = record.for_dense(pipe)
    for mask in masks.values():  # before the first is measured
        mask.check(pipe)
    denoiser = denoiser_of(pipe)
    dense = record.z0.double()
    variance = dense.var(correction=0)
    rows = []
    for name, mask in masks.items():
        gates = mask.gates(pipe)
        for sparsity in sparsities:
            gates.set(mask.at(pipe, sparsity).kept)
            with gates.attached(denoiser):
                latents = record.drawn_by(pipe, batch_size)
            errors = (latents.double() - dense).square().flatten(1).mean(1) / variance
            if not errors.isfinite().all():
                odd = (~errors.isfinite()).nonzero().flatten().tolist()[:5]
                raise UserError(
                    f"mask-error: {mask.file} at {sparsity}: errors of prompts {odd} are not"
                    f" finite; {why_not_finite(pipe)}"
                )
            rows.append((name, sparsity, errors.mean().item(), errors.quantile(0.5).item()))
    return pd.DataFrame(rows, columns=[*COLUMNS])
