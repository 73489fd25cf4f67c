"""How good a variant's pictures are: against real images, captions and the dense model's pictures.

Imports no diffusers: a job starts in the time of torch, torchmetrics and open_clip.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ecodiff.config.sections import EvaluateSettings
from ecodiff.evaluate.features import Clip, Features, Precomputed, inception
from ecodiff.evaluate.samples import Samples
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.pictures import read_picture
from ecodiff.toys import checker, world

KID_SUBSET = 1000  # samples in each of KID's 100 subsets, or half of the set if that is fewer


class Judge:
    """Judges variants one after another, with networks, texts and real images read only once."""

    def __init__(
        self,
        prompts: pd.DataFrame,
        dense: Samples,
        settings: EvaluateSettings,
        device: str = "cpu",
        table: str = "the prompt table",
    ) -> None:
        """Prepares what all variants are compared with.

        Args:
            prompts: columns `index` (int), `prompt` (str), `seed` (int), `image` (path of a real
                image, or None for all: then there is no FID, KID and CMMD).
            dense: the dense model's pictures of the same prompts.
            settings: the `evaluate` section of the config.
            device: where the feature networks run.
            table: the file of the prompts, for errors.

        Raises:
            UserError: an index is there twice, the pictures are not of these prompts, or a
                picture, a real image or the CLIP model is missing.
        """
        self.prompts = prompts.sort_values("index", ignore_index=True)
        self.dense, self.batch_size = dense, settings.batch_size
        twice = self.prompts["index"][self.prompts["index"].duplicated()].tolist()
        if twice:
            raise UserError(f"{table}: index {twice[0]} is there twice")
        dense.check_prompts(self.prompts, table)
        self.captions: list[str] = self.prompts["prompt"].tolist()
        self.clip = Clip(settings.clip_model, settings.clip_pretrained, device)
        self.features: Features = (
            inception(device) if settings.features == "inception" else self.clip.images
        )
        self.shares_features = settings.features == "clip"
        self.texts = torch.cat([self.clip.texts(self.captions[rows]) for rows in self._batches()])
        self.real, self.real_embedded = self._of_real_images()
        self.is_shapeworld = all(map(_is_shapeworld, self.captions))
        captions = self.captions if self.is_shapeworld else []
        self.pairs = np.array([len(world.parse_caption(c).things) == 2 for c in captions], bool)

    def __call__(self, samples: Samples) -> dict[str, float | int | None]:
        """Judges the pictures of one variant.

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

        Raises:
            UserError: the pictures can't be compared with the dense ones, see
                `Samples.check_dense`, or a latent or a metric is not finite.
        """
        samples.check_dense(self.dense)
        ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
        psnr = PeakSignalNoiseRatio(data_range=1.0)
        features, embeddings, met, errors = [], [], [], []
        moments = torch.zeros(3, dtype=torch.float64)
        for rows in self._batches():
            images, dense = samples.images(rows), self.dense.images(rows)
            embedded = self.clip.images(images)
            embeddings.append(embedded)
            features.append(embedded if self.shares_features else self.features(images))
            ssim.update(_unit(images), _unit(dense))
            psnr.update(_unit(images), _unit(dense))
            dense_z0 = self.dense.latents(rows).double()
            moments += _moments(dense_z0)
            errors.append((samples.latents(rows) - dense_z0).square().flatten(1).mean(1))
            if self.is_shapeworld:
                met += [
                    checker.meets(i, c) for i, c in zip(images, self.captions[rows], strict=True)
                ]
        noise, relative = psnr.compute().item(), torch.cat(errors) / _variance(moments)
        embedded, shown = torch.cat(embeddings), np.array(met, bool)
        judged = {
            "count": len(samples),
            **self._distances(torch.cat(features)),
            "cmmd": None if self.real is None else cmmd(self.real_embedded, embedded),
            "clip_score": F.cosine_similarity(embedded, self.texts).mean().item(),
            "scene_accuracy": _share(shown),
            "scene_accuracy_one": _share(shown[~self.pairs]),
            "scene_accuracy_two": _share(shown[self.pairs]),
            "ssim": ssim.compute().item(),
            "psnr": noise if np.isfinite(noise) else None,
            "latent_error": relative.mean().item(),
            "latent_error_median": relative.quantile(0.5).item(),
        }
        odd = [key for key, value in judged.items() if value is not None and not isfinite(value)]
        if odd:
            raise UserError(f"{samples}: {odd[0]} against {self.dense} is {judged[odd[0]]}")
        return judged

    def _batches(self) -> Iterator[slice]:
        return (
            slice(start, start + self.batch_size)
            for start in range(0, len(self.prompts), self.batch_size)
        )

    def _of_real_images(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Features and CLIP's embeddings of the real images, cut to the shape of the pictures
        around their centres."""
        paths = self.prompts["image"]
        if paths.isna().all():
            return None, None
        if paths.isna().any():
            without = self.prompts["index"][paths.isna()].iloc[0]
            raise UserError(f"prompts: prompt {without} has no image, but others have")
        if len(paths) < 4:
            raise UserError(f"prompts: FID and KID need at least 4 prompts, not {len(paths)}")
        height, width = self.dense.images(slice(0, 1)).shape[1:3]
        features, embeddings = [], []
        for rows in self._batches():
            images = np.stack([np.asarray(read_picture(p, (width, height))) for p in paths[rows]])
            embeddings.append(self.clip.images(images))
            features.append(embeddings[-1] if self.shares_features else self.features(images))
        return torch.cat(features), torch.cat(embeddings)

    def _distances(self, features: Tensor) -> dict[str, float | None]:
        """FID and KID by torchmetrics, in double precision; KID's subsets are always the same."""
        if self.real is None:
            return {"fid": None, "kid": None, "kid_std": None}
        network = Precomputed(features.shape[1])
        fid = FrechetInceptionDistance(feature=network)
        kid = KernelInceptionDistance(
            feature=network, subset_size=min(KID_SUBSET, len(features) // 2)
        )
        for metric in (fid, kid):
            metric.update(self.real.double(), real=True)
            metric.update(features.double(), real=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            mean, deviation = kid.compute()
        return {"fid": fid.compute().item(), "kid": mean.item(), "kid_std": deviation.item()}


def cmmd(real: Tensor, fake: Tensor) -> float:
    """Squared maximum mean discrepancy of two sets of CLIP embeddings, times 1,000 (Jayasumana et
    al. 2024, "Rethinking FID", "the CMMD metric").

    The embeddings, (n, d) and (m, d), are normalised; the kernel is exp(-|x - y|^2 / (2 * 10^2));
    the estimate is the biased one, so it is never below zero.
    """
    x, y = (F.normalize(values.double(), dim=1) for values in (real, fake))
    # Unit vectors: |x - y|^2 = 2 - 2 x.y
    kernels = (torch.exp((a @ b.T - 1) / 100).mean() for a, b in ((x, x), (y, y), (x, y)))
    within_real, within_fake, across = kernels
    return 1000 * (within_real + within_fake - 2 * across).item()


def _moments(z0: Tensor) -> Tensor:
    """Count, sum and squares of latents: float64 (3,)."""
    count = torch.tensor(z0.numel(), dtype=torch.float64)
    return torch.stack([count, z0.sum(), z0.square().sum()])


def _variance(moments: Tensor) -> float:
    """The variance of the latents that `_moments` were summed over."""
    count, total, squares = moments.tolist()
    return (squares - total**2 / count) / count


def _share(met: np.ndarray) -> float | None:
    """The share that is true; None of nothing."""
    return float(met.mean()) if len(met) else None


def _unit(images: np.ndarray) -> Tensor:
    """uint8 (n, height, width, 3) to float32 (n, 3, height, width) in [0, 1].

    In float64 SSIM differs by less than 1e-5, and torch takes ten times as long.
    """
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def _is_shapeworld(caption: str) -> bool:
    try:
        world.parse_caption(caption)
    except ValueError:
        return False
    return True
