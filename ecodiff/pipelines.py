"""Diffusers pipelines behind six verbs: load, encode, noise, denoise, decode, fingerprint.

Loops, schedulers and text encoders stay the pipeline's own. What differs between the families is
written once, in `_FAMILIES`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from ecodiff import saving
from ecodiff.errors import UserError
from ecodiff.structures import denoiser_of

__all__ = [
    "DTYPES",
    "Call",
    "call_arguments",
    "decode",
    "denoise",
    "denoiser_of",
    "encode",
    "fingerprint",
    "load_pipeline",
    "quiet",
    "starting_noise",
]

Call = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(
    source: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    variant: str | None = None,
) -> DiffusionPipeline:
    """Load a pipeline from a hub id, a folder, or the folder of a pruned model.

    Only safetensors weights are read. Raises `UserError` when `dtype` is unknown, or when the
    source is missing, truncated, or holds pickles only.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    path = Path(source)
    if path.is_dir() and variant is None:
        return saving.load(path, dtype=DTYPES[dtype]).to(device)
    if not path.is_dir() and (path.exists() or len(path.parts) != 2):
        raise UserError(f"source: {source} is neither a hub id (owner/name) nor a folder")
    # Bars are for people; a job's log wants lines, and ours has its own.
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    wanted = {"revision": revision, "variant": variant}
    try:
        pipe = DiffusionPipeline.from_pretrained(
            source,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            **{key: value for key, value in wanted.items() if value is not None},
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"source: {source} does not load: {reason}") from error
    return pipe.to(device)


@torch.no_grad()
def encode(pipe: DiffusionPipeline, prompts: list[str], call: Call) -> dict[str, Tensor]:
    """Encode prompts once, as keyword arguments for the pipeline's call.

    Returns `prompt_embeds` (n, tokens, C), `pooled_prompt_embeds` (n, C) and, under classifier-free
    guidance, their `negative_` counterparts; the denoiser's device and the encoders' dtype.
    """
    return _family(pipe).encode(pipe, list(prompts), call)


def starting_noise(pipe: DiffusionPipeline, seeds: list[int], call: Call) -> Tensor:
    """Draw each prompt's starting noise from its own seed, so that batches don't matter.

    Returns unit-variance latents in the layout that `latents=` takes, on the denoiser's device and
    dtype: (n, C, h, w) for a U-Net, packed (n, h/2 * w/2, 4C) for FLUX.
    """
    denoiser, family = denoiser_of(pipe), _family(pipe)
    height, width = _size(pipe, call)
    cell = 2 if family.packed else 1  # FLUX packs 2x2 latent pixels into a token
    channels = denoiser.config.in_channels // cell**2
    rows, columns = (cell * (side // (pipe.vae_scale_factor * cell)) for side in (height, width))
    noise = torch.stack(
        [
            torch.randn((channels, rows, columns), generator=torch.Generator("cpu").manual_seed(s))
            for s in seeds
        ]
    )
    if family.packed:
        noise = pipe._pack_latents(noise, len(seeds), channels, rows, columns)
    return noise.to(device=denoiser.device, dtype=denoiser.dtype)


@torch.no_grad()
def denoise(
    pipe: DiffusionPipeline, embeds: dict[str, Tensor], noise: Tensor, call: Call
) -> Tensor:
    """Run the pipeline from noise to its final latent z0, shaped and typed as `noise`."""
    with quiet(pipe):
        return pipe(**call_arguments(embeds, noise, call)).images


@torch.no_grad()
def decode(pipe: DiffusionPipeline, latents: Tensor, call: Call) -> np.ndarray:
    """Decode final latents exactly as the pipeline does: uint8 images (n, height, width, 3)."""
    vae, family = pipe.vae, _family(pipe)
    if family.packed:
        height, width = _size(pipe, call)
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    # SDXL's VAE overflows in half precision; its config says so.
    upcast = family.upcasts and vae.dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.to(torch.float32)
    mean, deviation = family.statistics(vae)
    latents = latents.to(vae.device, vae.dtype)
    latents = latents * deviation.to(latents) / vae.config.scaling_factor + mean.to(latents)
    images = vae.decode(latents, return_dict=False)[0]
    if upcast:
        vae.to(torch.float16)
    images = pipe.image_processor.postprocess(images, output_type="np")
    return (images * 255).round().astype(np.uint8)


def call_arguments(embeds: dict[str, Tensor], noise: Tensor, call: Call) -> dict[str, Any]:
    """The keyword arguments of one pipeline call that ends at the latents."""
    given = {key: value for key, value in call.items() if value is not None}
    return {**given, **embeds, "latents": noise, "output_type": "latent"}


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


def _size(pipe: DiffusionPipeline, call: Call) -> tuple[int, int]:
    default = pipe.default_sample_size * pipe.vae_scale_factor
    return call.get("height") or default, call.get("width") or default


def _encode_sdxl(pipe: DiffusionPipeline, prompts: list[str], call: Call) -> dict[str, Tensor]:
    guidance = call.get("guidance_scale")
    if guidance is None:
        guidance = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
    # The pipeline's own rule: distilled U-Nets take the guidance as an input instead.
    guided = guidance > 1 and pipe.unet.config.time_cond_proj_dim is None
    prompt, negative, pooled, negative_pooled = pipe.encode_prompt(
        prompt=prompts, do_classifier_free_guidance=guided
    )
    embeds = {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}
    if guided:
        embeds["negative_prompt_embeds"] = negative
        embeds["negative_pooled_prompt_embeds"] = negative_pooled
    return embeds


def _encode_flux(pipe: DiffusionPipeline, prompts: list[str], call: Call) -> dict[str, Tensor]:
    length = call.get("max_sequence_length")
    kwargs = {} if length is None else {"max_sequence_length": length}
    # The third value, text_ids, is zeros that the call makes again by itself.
    prompt, pooled, _ = pipe.encode_prompt(prompt=prompts, prompt_2=None, **kwargs)
    return {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}


def _statistics_sdxl(vae: nn.Module) -> tuple[Tensor, Tensor]:
    mean, deviation = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or deviation is None:
        return torch.tensor(0.0), torch.tensor(1.0)
    return torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(deviation).view(1, -1, 1, 1)


def _statistics_flux(vae: nn.Module) -> tuple[Tensor, Tensor]:
    return torch.tensor(vae.config.shift_factor), torch.tensor(1.0)


@dataclass(frozen=True)
class _Family:
    encode: Callable[[DiffusionPipeline, list[str], Call], dict[str, Tensor]]
    statistics: Callable[[nn.Module], tuple[Tensor, Tensor]]  # the latents' mean and deviation
    packed: bool
    upcasts: bool


_FAMILIES = {
    "StableDiffusionXLPipeline": _Family(_encode_sdxl, _statistics_sdxl, False, True),
    "FluxPipeline": _Family(_encode_flux, _statistics_flux, True, False),
}


def _family(pipe: DiffusionPipeline) -> _Family:
    for base in type(pipe).__mro__:
        if base.__name__ in _FAMILIES:
            return _FAMILIES[base.__name__]
    allowed = ", ".join(_FAMILIES)
    raise UserError(f"{type(pipe).__name__}: not a supported pipeline; supported are {allowed}")
