"""Diffusers pipelines behind five verbs: encode, noise, denoise, decode, fingerprint.

Loops, schedulers and text encoders stay the pipeline's own. What differs between the families is
written once, in `ecodiff.models.families`.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ecodiff.models import families
from ecodiff.models.calls import check_call, mixed_dtypes
from ecodiff.models.families import Call
from ecodiff.models.identity import OLD, is_fingerprint, packed, same_denoiser, same_model
from ecodiff.models.libraries import errors_only, refuse_offloaded
from ecodiff.models.pruned import Pruned
from ecodiff.models.structures import denoiser_of
from ecodiff.runtime.errors import UserError, first_line

VALUES = 4  # of each weight that a fingerprint holds

__all__ = [
    "Call",
    "call_arguments",
    "check_dense",
    "check_fingerprint",
    "decode",
    "denoise",
    "denoiser_of",
    "dense_fingerprint",
    "encode",
    "fingerprint",
    "latent_dtype",
    "name_of",
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
    return noise.to(device=denoiser.device, dtype=latent_dtype(pipe))


def latent_dtype(pipe: DiffusionPipeline) -> torch.dtype:
    """The dtype of the pipeline's latents."""
    family = families.family_of(pipe)
    return torch.float32 if family.keeps_float32 else denoiser_of(pipe).dtype


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

    A video is shown by its first frame. Safety checkers are left out. Raises `FloatingPointError`
    with the list of those rows whose pictures are not finite.
    """
    vae, family = pipe.vae, families.family_of(pipe)
    if family.is_packed:
        height, width = families.size(pipe, call)
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    if latents.ndim == 5:  # causal in time: the first frame needs no other
        latents = latents[:, :, :1]
    with _upcast(vae, family):
        latents = families.denormalised(vae, latents.to(vae.device, vae.dtype))
        images = vae.decode(latents, return_dict=False)[0]
    if images.ndim == 5:
        images = images[:, :, 0]
    finite = images.flatten(1).isfinite().all(1)
    if not finite.all():
        raise FloatingPointError((~finite).nonzero().flatten().tolist())
    processor = pipe.video_processor if family.is_video else pipe.image_processor
    images = processor.postprocess(images, output_type="np")
    return (images * 255).round().astype(np.uint8)


def encode_pictures(pipe: DiffusionPipeline, pictures: np.ndarray) -> Tensor:
    """Encode pictures as final latents: what `decode` gives them back from, up to the VAE's error.

    Args:
        pipe: the pipeline.
        pictures: uint8 (n, height, width, 3), of the size that is drawn.

    Returns:
        Latents (n, ...) in the layout of the pipeline's, the mode of what the VAE encodes.
    """
    vae, family = pipe.vae, families.family_of(pipe)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1
    is_causal = vae.config.get("temperal_downsample") is not None
    with _upcast(vae, family):
        pixels = pixels.to(vae.dtype)
        found = vae.encode(pixels[:, :, None] if is_causal else pixels)
    latents = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latent
    latents = families.normalised(vae, latents.to(latent_dtype(pipe)))
    if family.is_packed:
        if latents.ndim == 5:
            latents = latents[:, :, 0]
        latents = pipe._pack_latents(latents, *latents.shape)
    return latents


@contextmanager
def _upcast(vae: nn.Module, family: families.Family) -> Iterator[None]:
    """SDXL's VAE overflows in half precision; inside, it is float32 where its config says so."""
    upcast = family.upcasts and vae.dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(torch.float16)


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
    """What determines z0, to be compared by `identity.same_model`: classes and configs of denoiser
    and scheduler, and four evenly spaced values of every weight.

    The same weights in another dtype are the same model; any training or pruning makes another. A
    model of 12B takes seconds.
    """
    denoiser, values = denoiser_of(pipe), []
    digest, scheduler = (_digest_of_config(part) for part in (denoiser, pipe.scheduler))
    refuse_offloaded(denoiser, "weights")
    for name, weight in denoiser.state_dict().items():
        flat = weight.detach().reshape(-1)
        spread = torch.linspace(0, max(flat.numel() - 1, 0), min(VALUES, flat.numel())).long()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        values.append(flat[spread.to(flat.device)].float().cpu())
    digests = (one.hexdigest()[:16] for one in (digest, scheduler))
    return packed(*digests, torch.cat(values).numpy())


def _digest_of_config(part: Any) -> Any:
    """A SHA-256 of a denoiser's or scheduler's class and config, to go on with."""
    config = {k: v for k, v in dict(part.config).items() if not k.startswith("_")}
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(f"{type(part).__name__}{text}".encode())


def dense_fingerprint(pipe: DiffusionPipeline) -> str:
    """The fingerprint of the dense model that a pipeline was pruned from; its own if it wasn't.

    Raises `UserError` when an older ecodiff pruned it, and did not say.
    """
    denoiser = denoiser_of(pipe)
    if not isinstance(denoiser, Pruned):
        return fingerprint(pipe)
    found = denoiser.config["pruned"].get("dense")
    if not is_fingerprint(found or ""):
        raise UserError(f"{name_of(pipe)}: {OLD}")
    return found


def check_fingerprint(
    file: str,
    recorded: str,
    wanted: str,
    pipe: DiffusionPipeline,
    same: Callable[[str, str], bool] = same_model,
) -> None:
    """Raise `UserError` unless what a file was made of is the model that is wanted: that of `pipe`.

    Args:
        file: the file's name.
        recorded, wanted: fingerprints.
        pipe: for its name.
        same: of `identity`; `same_denoiser` where it doesn't matter how the model is sampled.
    """
    if not is_fingerprint(recorded):
        raise UserError(f"{file}: {OLD}")
    if not same(recorded, wanted):
        raise UserError(
            f"{file}: was made of another model than {name_of(pipe)} (config, weights or scheduler"
            " differ); run the stage that made it again"
        )


def check_dense(pipe: DiffusionPipeline, dense: DiffusionPipeline) -> None:
    """Raise `UserError` unless a pipeline was pruned from a dense one, or is of its family."""
    denoiser, other = denoiser_of(pipe), denoiser_of(dense)
    if isinstance(other, Pruned):
        raise UserError(f"{name_of(dense)}: is a pruned model, where the dense one is needed")
    if not isinstance(denoiser, type(other)):
        kinds = f"{type(denoiser).__name__} and {type(other).__name__}"
        raise UserError(f"{name_of(pipe)}: is of another family than {name_of(dense)} ({kinds})")
    if isinstance(denoiser, Pruned) and not same_denoiser(
        dense_fingerprint(pipe), fingerprint(dense)
    ):
        raise UserError(f"{name_of(pipe)}: was pruned from another model than {name_of(dense)}")


def name_of(pipe: DiffusionPipeline) -> str:
    """Where a pipeline was loaded from, for errors; its class when nobody knows."""
    return str(pipe.config.get("_name_or_path") or type(pipe).__name__)
