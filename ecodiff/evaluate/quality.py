"""How good a variant's pictures are: metrics of a whole set, reduced from what was seen of shards.

Imports no diffusers.
"""

from __future__ import annotations

import logging
from math import isfinite, log10
from typing import Any

import torch
from torch import Tensor

from ecodiff.evaluate.distances import cmmd, frechet, kid, moments, poisson, resampled_kid
from ecodiff.evaluate.shards import Seen
from ecodiff.runtime.errors import UserError

log = logging.getLogger(__name__)
Metrics = dict[str, float | None]


def quality(
    seen: Seen, real: Seen | None = None, resamples: int = 0, device: str = "cpu"
) -> dict[str, Any]:
    """Judges the pictures of one variant.

    Memory does not grow with the number of pictures, but for some bytes of each.

    Args:
        seen: what `shards.see` found of the variant's pictures.
        real: what `shards.see_real` found of the real images of the same prompts, if any.
        resamples: on how many resampled sets of prompts each metric is found again (bootstrap).
        device: where distances are computed.

    Returns:
        count: pictures judged.
        fid: Frechet distance to the real images; None without real images.
        kid, kid_std: kernel distance to the real images and its deviation over subsets. An
            unbiased estimate, so it can be below zero.
        cmmd: kernel distance of CLIP's embeddings to those of the real images, see `cmmd`.
        clip_score: mean cosine of image and caption.
        scene_accuracy: share of pictures that the ShapeWorld checker finds to show what
            the caption says; None unless every caption is ShapeWorld's.
        scene_accuracy_one, scene_accuracy_two: that of captions with one and two objects.
        ssim, psnr: against the dense model's pictures (psnr in dB, over the pooled squared
            error; None when the pictures are identical, where it is infinite).
        latent_error: mean((z0' - z0)^2) / var(z0) over the whole set (EcoDiff, objective).
        latent_error_median: the median over pictures of each one's; the mean is ruled by the
            few pictures that turn out as something else.
        resampled: metric -> its values on the resampled sets, for metrics that have one on each.
            The sets are the same for all variants, so differences can be taken set by set.

    Raises:
        UserError: the real images are of other prompts or were seen by other networks, there are
            fewer than 4 for a distance, or a metric is not finite.
    """
    weights, once = poisson(len(seen), resamples), torch.ones(len(seen), 1, dtype=torch.uint8)
    judged: Metrics = {"count": len(seen), "fid": None, "kid": None, "kid_std": None, "cmmd": None}
    resampled: dict[str, list[float]] = {}
    if real is not None:
        _check_real(seen, real)
        of_features, of_cmmd = (
            [one.rows(name, device) for one in (real, seen)] for name in ("features", "cmmd")
        )
        judged["kid"], judged["kid_std"] = kid(*of_features)
        judged["fid"] = frechet(*map(moments, of_features))
        judged["cmmd"] = cmmd(*of_cmmd, once).item()
        if resamples:
            resampled["kid"] = resampled_kid(*of_features, weights).tolist()
            resampled["cmmd"] = cmmd(*of_cmmd, weights).tolist()
            resampled["fid"] = [
                frechet(*(moments(rows, drawn) for rows in of_features)) for drawn in weights.T
            ]
    columns = {name: seen.column(name) for name in MEANS_OF}
    judged |= _means(columns, once[:, 0])
    odd = [key for key, value in judged.items() if value is not None and not isfinite(value)]
    if odd:
        raise UserError(f"{seen}: {odd[0]} is {judged[odd[0]]}")
    drawn = [_means(columns, one) for one in weights.T]
    for key in (key for key, value in judged.items() if value is not None and drawn):
        values = [one.get(key) for one in drawn]
        if all(value is not None and isfinite(value) for value in values):
            resampled[key] = values
    return {**judged, "resampled": resampled}


def _check_real(seen: Seen, real: Seen) -> None:
    about, width = real.about[0], real.rows("features").width
    seen.check(about["settings"], about["size"], f"{real}: does not fit ")
    if not torch.equal(seen.column("index"), real.column("index")):
        raise UserError(f"{seen}: is not of the prompts of {real}")
    if len(seen) < 4:
        raise UserError(f"prompts: FID and KID need at least 4 prompts, not {len(seen)}")
    if len(seen) <= width:
        log.warning(
            "quality: FID of %s pictures on %s features is biased upwards (more pictures than"
            " features are needed); see KID",
            len(seen),
            width,
        )


# What `_means` reads, of each picture.
MEANS_OF = (
    *("clip_score", "ssim", "squared_error", "latent_error", "dense_mean", "dense_square"),
    *("objects", "shown"),
)


def _means(columns: dict[str, Tensor], weights: Tensor) -> Metrics:
    """The metrics that are means over pictures, each of which counts `weights` (n,) times."""

    def mean(values: Tensor, of: Tensor | None = None) -> float | None:
        counts = weights.double() if of is None else weights * of.double()
        return ((values * counts).sum() / counts.sum()).item() if counts.any() else None

    objects, shown = columns["objects"], columns["shown"]
    names = bool(objects.all())  # every caption is ShapeWorld's
    error = mean(columns["squared_error"]) or 0.0
    variance = (mean(columns["dense_square"]) or 0.0) - (mean(columns["dense_mean"]) or 0.0) ** 2
    relative = columns["latent_error"] / variance
    return {
        "clip_score": mean(columns["clip_score"]),
        "scene_accuracy": mean(shown) if names else None,
        "scene_accuracy_one": mean(shown, objects == 1) if names else None,
        "scene_accuracy_two": mean(shown, objects == 2) if names else None,
        "ssim": mean(columns["ssim"]),
        "psnr": -10 * log10(error) if error else None,
        "latent_error": mean(relative),
        "latent_error_median": relative.repeat_interleave(weights.long()).quantile(0.5).item(),
    }
