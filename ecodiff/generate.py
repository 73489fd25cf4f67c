"""From prompts to pictures: one shard of images and final latents, made by one model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ecodiff.models.calls import log_cut_prompts, why_not_finite
from ecodiff.models.identity import LATENTS, Origin
from ecodiff.models.pipelines import (
    decode,
    denoise,
    dense_fingerprint,
    encode,
    fingerprint,
    starting_noise,
)
from ecodiff.runtime.artifacts import atomic
from ecodiff.runtime.code import code_hash
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.parts import Parts, link_or_copy
from ecodiff.runtime.state import unfinished

if TYPE_CHECKING:
    import pandas as pd
    from diffusers import DiffusionPipeline


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
    pipeline; in its metadata an `identity.Origin`) to `folder`, which is written whole or not at
    all. A shard that was stopped or killed goes on after its last whole batch.

    Args:
        pipe: the dense or a pruned pipeline.
        prompts: columns `index` (int), `prompt` (str), `seed` (int).
        call: the `call` section of the model, as keyword arguments of the pipeline.
        batch_size: prompts that pass through the pipeline together.
        folder: where to write.

    Raises:
        UserError: an index is in the table twice, or a final latent or a picture is not finite;
            the prompts are named.
    """
    numbers = prompts["index"].tolist()
    twice = prompts["index"][prompts["index"].duplicated()].tolist()
    if twice:
        raise UserError(f"prompts: index {twice[0]} is in the table twice")
    origin = Origin(
        model=fingerprint(pipe),
        dense=dense_fingerprint(pipe),
        call=dict(call),
        prompts=prompts["prompt"].tolist(),
        seeds=prompts["seed"].tolist(),
    )
    log_cut_prompts(pipe, prompts["prompt"].tolist(), call)
    kind = {"code": code_hash("generate"), "batch": batch_size, "rows": numbers}
    kind |= {"dtype": str(pipe.dtype), "device": pipe.device.type}
    parts = Parts(unfinished(folder), {**kind, **asdict(origin)})
    for start in range(0, len(prompts), batch_size):
        with parts.make(start) as part:
            if part is not None:
                _draw(pipe, prompts.iloc[start : start + batch_size], call, part)
    with atomic(folder, folder=True) as scratch:
        for file in parts.files("*.png"):
            link_or_copy(file, scratch / file.name)
        latents = [load_file(file)["z0"] for file in parts.files(LATENTS)]
        tensors = {"index": torch.tensor(numbers, dtype=torch.int64), "z0": torch.cat(latents)}
        save_file(tensors, scratch / LATENTS, metadata=origin.metadata())
    parts.discard()


def _draw(pipe: DiffusionPipeline, rows: pd.DataFrame, call: dict[str, Any], folder: Path) -> None:
    """Pictures and final latents of one batch."""
    with torch.inference_mode():
        embeds = encode(pipe, rows["prompt"].tolist(), call)
        noise = starting_noise(pipe, rows["seed"].tolist(), call)
        z0 = denoise(pipe, embeds, noise, call)
        latents = z0.float().cpu()
        _refuse(pipe, "latents", rows["index"][~latents.flatten(1).isfinite().all(1).numpy()])
        try:
            images = decode(pipe, z0, call)
        except FloatingPointError as error:
            _refuse(pipe, "pictures", rows["index"].iloc[error.args[0]])
            raise
    for index, image in zip(rows["index"], images, strict=True):
        Image.fromarray(image).save(folder / f"{index:05d}.png")
    save_file({"z0": latents.contiguous()}, folder / LATENTS)


def _refuse(pipe: DiffusionPipeline, what: str, bad: pd.Series) -> None:
    """Raise `UserError` when what the pipeline made is not finite for the prompts of an index."""
    if len(bad):
        first = bad.tolist()[:5]
        raise UserError(
            f"generate: {what} of prompts {first} are not finite; {why_not_finite(pipe)}"
        )
