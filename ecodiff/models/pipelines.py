"""Diffusers pipelines behind five verbs: encode, noise, denoise, decode, fingerprint.

Loops, schedulers and text encoders stay the pipeline's own. What differs between the families is
written once, in `ecodiff.models.families`.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ecodiff.models import families
from ecodiff.models.calls import check_call, mixed_dtypes
from ecodiff.models.families import Call
from ecodiff.models.libraries import errors_only
from ecodiff.models.structures import denoiser_of
from ecodiff.runtime.errors import UserError, first_line

__all__ = [
    "Call",
    "call_arguments",
    "decode",
    "denoise",
    "denoiser_of",
    "encode",
    "fingerprint",
    "quiet",
    "starting_noise",
]


@torch.no_grad()
def encode(pipe: DiffusionPipeline, prompts: list[str], call: Call) -> dict[str, Tensor]:
    """Encode prompts once, as what `call_arguments` makes keyword arguments of the call from.

    Returns `prompt_embeds` (n, tokens, C) with, where the family has them, pooled ones (n, C) and a
    mask (n, tokens), and their `negative_` counterparts under classifier-free guidance. Tokens are
    of a fixed number, so that rows of different batches fit together; the denoiser's device and the
    encoders' dtype.

    Raises `UserError` when the pipeline is not supported, or can't be called with `call`.
    """
    check_call(pipe, call)
    with errors_only():
        return families.embeddings(pipe, prompts, call)


def starting_noise(pipe: DiffusionPipeline, seeds: list[int], call: Call) -> Tensor:
    """Draw each prompt's starting noise from its own seed, so that batches don't matter.

    Returns unit-variance latents in the layout that `latents=` takes, on the denoiser's device and
    in the dtype of the pipeline's latents: (n, C, h, w), for videos (n, C, frames, h, w), packed
    (n, h/2 * w/2, 4C) for FLUX and Qwen-Image.

    Raises `UserError` when `call` asks for a size that the pipeline can't draw.
    """
    denoiser, family = denoiser_of(pipe), families.family_of(pipe)
    # Not by `prepare_latents`, which scales by the scheduler's sigma: the call does that again.
    shape = families.latent_shape(pipe, call)
    noise = torch.stack(
        [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(s)) for s in seeds]
    )
    if family.is_packed:
        noise = pipe._pack_latents(noise, *noise.shape)
    dtype = torch.float32 if family.keeps_float32 else denoiser.dtype
    return noise.to(device=denoiser.device, dtype=dtype)


@torch.no_grad()
def denoise(
    pipe: DiffusionPipeline, embeds: dict[str, Tensor], noise: Tensor, call: Call
) -> Tensor:
    """Run the pipeline from noise to its final latent z0, shaped and typed as `noise`.

    Raises `UserError` with what the pipeline itself finds wrong with `call`, or when it was loaded
    in dtypes that don't fit together.
    """
    given = call_arguments(pipe, embeds, noise, call)
    try:
        with quiet(pipe):
            return pipe(**given)[0].to(noise.dtype)
    except ValueError as error:
        raise UserError(f"call: {first_line(error)}") from error
    except RuntimeError as error:
        mixed = mixed_dtypes(pipe)
        if mixed is None or "dtype" not in str(error):
            raise
        raise UserError(mixed) from error


@torch.no_grad()
def decode(pipe: DiffusionPipeline, latents: Tensor, call: Call) -> np.ndarray:
    """Decode final latents exactly as the pipeline does: uint8 images (n, height, width, 3).

    A video is shown by its first frame. Safety checkers are left out.
    """
    vae, family = pipe.vae, families.family_of(pipe)
    if family.is_packed:
        height, width = families.size(pipe, call)
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    if latents.ndim == 5:  # causal in time: the first frame needs no other
        latents = latents[:, :, :1]
    # SDXL's VAE overflows in half precision; its config says so.
    upcast = family.upcasts and vae.dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.to(torch.float32)
    latents = families.denormalised(vae, latents.to(vae.device, vae.dtype))
    images = vae.decode(latents, return_dict=False)[0]
    if upcast:
        vae.to(torch.float16)
    if images.ndim == 5:
        images = images[:, :, 0]
    processor = pipe.video_processor if family.is_video else pipe.image_processor
    images = processor.postprocess(images, output_type="np")
    return (images * 255).round().astype(np.uint8)


def call_arguments(
    pipe: DiffusionPipeline, embeds: Mapping[str, Tensor], noise: Tensor, call: Call
) -> dict[str, Any]:
    """The keyword arguments of one pipeline call that returns a tuple, the final latents first.

    Raises `UserError` when a key of `call` is unknown to the pipeline.
    """
    # For schedulers that draw noise at each step, such as LCM's: a prompt's is its own there too.
    rows = noise.flatten(1)[:, :64].float().cpu().numpy()
    seeds = [zlib.crc32(row.tobytes()) for row in rows]
    return {
        **families.arguments(pipe, embeds, call),
        "latents": noise,
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        "output_type": "latent",
        "return_dict": False,
    }


@contextmanager
def quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    """Silence the pipeline's progress bar, then put its setting back."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def fingerprint(pipe: DiffusionPipeline) -> str:
    """A digest of what determines z0: the denoiser's config and weights, and the scheduler.

    Sixteen evenly spaced values of every weight are hashed, so a 12B model takes seconds, while any
    training or pruning changes the digest.
    """
    denoiser, digest = denoiser_of(pipe), hashlib.sha256()
    for part in (denoiser, pipe.scheduler):
        config = {k: v for k, v in dict(part.config).items() if not k.startswith("_")}
        digest.update(type(part).__name__.encode())
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in denoiser.state_dict().items():
        flat = weight.detach().reshape(-1)
        spread = torch.linspace(0, max(flat.numel() - 1, 0), min(16, flat.numel())).long()
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(flat[spread.to(flat.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
