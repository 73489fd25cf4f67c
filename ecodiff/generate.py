"""From prompts to pictures: one shard of images and final latents, made by one model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors.torch import save_file

from ecodiff.models.calls import log_cut_prompts, why_not_finite
from ecodiff.models.pipelines import decode, denoise, encode, starting_noise
from ecodiff.runtime.artifacts import atomic
from ecodiff.runtime.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from diffusers import DiffusionPipeline


def shard_of(prompts: pd.DataFrame, shard: int, shard_size: int) -> pd.DataFrame:
    """The rows of one shard: `shard_size` rows of the table, the last shard maybe fewer.

    Raises:
        UserError: the table has no such shard.
    """
    shards = -(-len(prompts) // shard_size)
    if not 0 <= shard < shards:
        raise UserError(f"shard: {shard} is not one of 0 to {shards - 1} ({len(prompts)} prompts)")
    return prompts.iloc[shard * shard_size : (shard + 1) * shard_size]


def generate(
    pipe: DiffusionPipeline,
    prompts: pd.DataFrame,
    call: dict[str, Any],
    batch_size: int,
    folder: Path,
) -> None:
    """Draw a picture for each prompt, from the noise of that prompt's own seed.

    Neither the batch nor the shard that a prompt falls into changes its picture: seeds come with
    the table, and text is padded to a fixed length. Writes `{index:05d}.png` and
    `latents.safetensors` (`index` int64 (n,), `z0` float32 (n, *latent) in the layout of the
    pipeline) to `folder`, which is written whole or not at all.

    Args:
        pipe: the dense or a pruned pipeline.
        prompts: columns `index` (int), `prompt` (str), `seed` (int).
        call: the `call` section of the model, as keyword arguments of the pipeline.
        batch_size: prompts that pass through the pipeline together.
        folder: where to write.

    Raises:
        UserError: a final latent is not finite; the prompts are named.
    """
    latents = []
    log_cut_prompts(pipe, prompts["prompt"].tolist(), call)
    with atomic(folder) as scratch:
        scratch.mkdir()
        for start in range(0, len(prompts), batch_size):
            rows = prompts.iloc[start : start + batch_size]
            with torch.inference_mode():
                embeds = encode(pipe, rows["prompt"].tolist(), call)
                noise = starting_noise(pipe, rows["seed"].tolist(), call)
                z0 = denoise(pipe, embeds, noise, call)
                latents.append(_finite(pipe, z0, rows["index"].tolist()))
                images = decode(pipe, z0, call)
            for index, image in zip(rows["index"], images, strict=True):
                Image.fromarray(image).save(scratch / f"{index:05d}.png")
        index = torch.tensor(prompts["index"].tolist(), dtype=torch.int64)
        save_file({"index": index, "z0": torch.cat(latents)}, scratch / "latents.safetensors")


def _finite(pipe: DiffusionPipeline, z0: torch.Tensor, indices: list[int]) -> torch.Tensor:
    """z0 as float32 on the CPU, once it is known to be finite."""
    z0 = z0.float().cpu()
    good = z0.flatten(1).isfinite().all(1)
    if not good.all():
        bad = [index for index, fine in zip(indices, good.tolist(), strict=True) if not fine]
        why = why_not_finite(pipe)
        raise UserError(f"generate: latents of prompts {bad[:5]} are not finite; {why}")
    return z0
