"""What differs between pipeline classes: one table, and what follows from its rows.

All else is asked of the pipeline itself: `encode_prompt` and `__call__` get the call's settings or
their own defaults, and the VAE's config says how latents are normalised.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from ecodiff.models.structures import denoiser_of
from ecodiff.runtime.errors import UserError

Call = dict[str, Any]


def _trimmed(name: str, texts: Tensor, mask: Tensor) -> dict[str, Any]:
    """Texts cut to the longest of the batch, as the pipeline itself pads them, and their mask."""
    longest = int(mask.sum(1).max())
    return {name: texts[:, :longest], f"{name}_mask": mask[:, :longest]}


def _masked(name: str, texts: Tensor, mask: Tensor) -> dict[str, Any]:
    """Texts with their mask, which AuraFlow asks for and does not use."""
    return {name: texts, f"{name.removesuffix('embeds')}attention_mask": mask}


def _listed(name: str, texts: Tensor, mask: Tensor) -> dict[str, Any]:
    """Texts as a list of tensors (tokens, C), each without its padding."""
    return {name: [text[valid] for text, valid in zip(texts, mask, strict=True)]}


@dataclass(frozen=True)
class Family:
    """How the pipelines of one class are called.

    Attributes:
        embeds: names of the call's arguments for the values that `encode_prompt` returns, in order;
            "" for one that the call makes itself.
        guidance: the call's argument for the scale of classifier-free guidance.
        threshold: guidance is on when the scale is above this.
        negative: default prompt of the unconditional branch; None: `encode_prompt` encodes it.
        takes_turns: the two guidance branches are two runs of the denoiser, not one batch.
        cell: latent pixels along the side of a token (the patch size).
        is_packed: latents are sequences of tokens, (n, tokens, channels).
        is_video: latents have a dimension of frames.
        keeps_float32: latents are float32 whatever the denoiser's dtype.
        upcasts: a float16 VAE decodes in float32 when its config has `force_upcast`.
        texts: turns padded text embeddings (n, length, C) and their mask (n, length) into the
            call's arguments, for pipelines that don't pad to a fixed length themselves.
        fixed: arguments of the call that are always the same.
    """

    embeds: tuple[str, ...] = ("prompt_embeds", "negative_prompt_embeds")
    guidance: str = "guidance_scale"
    threshold: float = 1.0
    negative: str | None = None
    takes_turns: bool = False
    cell: int = 1
    is_packed: bool = False
    is_video: bool = False
    keeps_float32: bool = False
    upcasts: bool = False
    texts: Callable[[str, Tensor, Tensor], dict[str, Any]] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)


_POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_MASKED = ("prompt_embeds", "prompt_attention_mask")
_MASKED += tuple(f"negative_{name}" for name in _MASKED)
# Binning would change the height and width that were asked for; and the call refuses a negative
# prompt (its default is an empty one) together with negative embeddings.
_UNBINNED = {"use_resolution_binning": False, "negative_prompt": None}
_FLUX = Family(
    ("prompt_embeds", "pooled_prompt_embeds"),
    guidance="true_cfg_scale",
    negative="",
    takes_turns=True,
    cell=2,
    is_packed=True,
)

FAMILIES = {
    "StableDiffusionPipeline": Family(),
    "StableDiffusionXLPipeline": Family((*Family.embeds, *_POOLED), upcasts=True),
    "StableDiffusion3Pipeline": Family((*Family.embeds, *_POOLED), cell=2),
    "FluxPipeline": _FLUX,
    "FluxKontextPipeline": _FLUX,
    "ChromaPipeline": Family(
        (*_MASKED[:1], "", *_MASKED[1:3], "", *_MASKED[3:]),
        takes_turns=True,
        cell=2,
        is_packed=True,
    ),
    "OvisImagePipeline": Family(
        takes_turns=True, cell=2, is_packed=True, fixed={"negative_prompt": None}
    ),
    "AuraFlowPipeline": Family(
        ("prompt_embeds", "", "negative_prompt_embeds"), cell=2, upcasts=True, texts=_masked
    ),
    "PixArtSigmaPipeline": Family(_MASKED, cell=2, fixed=_UNBINNED),
    "QwenImagePipeline": Family(
        ("prompt_embeds", "prompt_embeds_mask"),
        guidance="true_cfg_scale",
        negative=" ",
        takes_turns=True,
        cell=2,
        is_packed=True,
        texts=_trimmed,
    ),
    "ZImagePipeline": Family(threshold=0.0, cell=2, keeps_float32=True, texts=_listed),
    "SanaPipeline": Family(_MASKED, keeps_float32=True, fixed=_UNBINNED),
    "WanPipeline": Family(takes_turns=True, cell=2, is_video=True, keeps_float32=True),
}


def family_of(pipe: DiffusionPipeline) -> Family:
    """The row of `FAMILIES` for a pipeline; subclasses count as their base.

    Raises:
        UserError: its class is not supported, or it has two denoisers (Wan 2.2 A14B).
    """
    name = next((c.__name__ for c in type(pipe).__mro__ if c.__name__ in FAMILIES), None)
    if name is None:
        allowed = ", ".join(FAMILIES)
        raise UserError(f"{type(pipe).__name__}: not a supported pipeline; supported are {allowed}")
    if getattr(pipe, "transformer_2", None) is not None:
        raise UserError(f"{name}: has two denoisers; only models with one are supported")
    return FAMILIES[name]


def embeddings(pipe: DiffusionPipeline, prompts: Sequence[str], call: Call) -> dict[str, Tensor]:
    """Encode n prompts as keyword arguments of the call, each (n, ...); see `pipelines.encode`.

    With guidance, embeddings of the negative prompt are included.
    """
    family = family_of(pipe)
    found = _encoded(pipe, prompts, call)
    if family.negative is not None and is_guided(pipe, call):
        text = call.get("negative_prompt")
        texts = [family.negative if text is None else text] * len(prompts)
        negative = _encoded(pipe, texts, call)
        found |= {f"negative_{name}": value for name, value in negative.items()}
    if family.texts is None:
        return found
    length = argument(pipe, call, "max_sequence_length")
    padded: dict[str, Tensor] = {}
    for name in _texts(found):
        padded |= _padded(name, found[name], found.get(f"{name}_mask"), length)
    return padded


def arguments(pipe: DiffusionPipeline, embeds: Mapping[str, Tensor], call: Call) -> dict[str, Any]:
    """Keyword arguments of the pipeline's call: embeddings, the `call` settings, fixed ones.

    Raises:
        UserError: a key of `call` is no argument of this pipeline.
    """
    family = family_of(pipe)
    given = {key: value for key, value in call.items() if value is not None}
    for key in given.keys() - _defaults(pipe).keys():
        raise UserError(f"call: {key} is not a setting of {type(pipe).__name__}")
    given.pop("negative_prompt", None)  # encoded, as all prompts are
    laid_out = dict(embeds)
    if family.texts is not None:
        laid_out = {}
        for name in _texts(embeds):
            laid_out |= family.texts(name, embeds[name], embeds[f"{name}_mask"])
    if "max_area" in _defaults(pipe):  # Kontext would change the sides to have that area
        height, width = size(pipe, call)
        given["max_area"] = height * width
    return {**family.fixed, **given, **laid_out}


def unguided(pipe: DiffusionPipeline, call: Call) -> Call:
    """The same call with classifier-free guidance off."""
    family = family_of(pipe)
    return {**call, family.guidance: family.threshold}


def is_guided(pipe: DiffusionPipeline, call: Call) -> bool:
    """Whether classifier-free guidance is on, by the pipeline's own rule."""
    family = family_of(pipe)
    # Guidance-distilled U-Nets (LCM) take the scale as an input instead.
    is_distilled = denoiser_of(pipe).config.get("time_cond_proj_dim") is not None
    return argument(pipe, call, family.guidance) > family.threshold and not is_distilled


def runs_per_step(pipe: DiffusionPipeline, embeds: Mapping[str, Tensor]) -> int:
    """Runs of the denoiser per denoising step: 2 where guidance branches run one by one, else 1."""
    return 1 + (family_of(pipe).takes_turns and "negative_prompt_embeds" in embeds)


def size(pipe: DiffusionPipeline, call: Call) -> tuple[int, int]:
    """Height and width of the image in pixels, by default the pipeline's own.

    Raises:
        UserError: a side is unknown, or no multiple of the pixels that a token covers.
    """
    family = family_of(pipe)
    factor = _spatial_factor(pipe)
    sample = getattr(pipe, "default_sample_size", denoiser_of(pipe).config.get("sample_size"))
    default = sample * factor if isinstance(sample, int) else None
    sides = {name: argument(pipe, call, name) or default for name in ("height", "width")}
    for name, side in sides.items():
        if side is None or side % (factor * family.cell):
            raise UserError(f"call: {name} is {side}, must be a multiple of {factor * family.cell}")
    return sides["height"], sides["width"]


def latent_shape(pipe: DiffusionPipeline, call: Call) -> tuple[int, ...]:
    """Shape of one prompt's latents before packing: (C, h, w), for video (C, frames, h, w).

    Raises:
        UserError: height, width or number of frames do not divide into latents.
    """
    family, factor = family_of(pipe), _spatial_factor(pipe)
    height, width = (side // factor for side in size(pipe, call))
    channels = denoiser_of(pipe).config.in_channels
    if not family.is_video:
        return channels // (family.cell**2 if family.is_packed else 1), height, width
    frames, step = argument(pipe, call, "num_frames"), pipe.vae_scale_factor_temporal
    if (frames - 1) % step:
        raise UserError(f"call: num_frames is {frames}, must be 1 or 1 plus a multiple of {step}")
    return channels, (frames - 1) // step + 1, height, width


def denormalised(vae: nn.Module, latents: Tensor) -> Tensor:
    """Latents (n, C, ...) as the VAE decodes them: undo scaling and shift by the VAE's config."""
    scale, deviation, mean = _normalisation(vae, latents)
    return latents * deviation / scale + mean


def normalised(vae: nn.Module, latents: Tensor) -> Tensor:
    """Latents (n, C, ...) of the VAE as the denoiser reads them: the inverse of `denormalised`."""
    scale, deviation, mean = _normalisation(vae, latents)
    return (latents - mean) * scale / deviation


def _normalisation(vae: nn.Module, latents: Tensor) -> tuple[float, Tensor | float, Tensor | float]:
    """Scale, deviation and mean by the VAE's config, the latter two maybe of each channel."""
    config = vae.config
    scale = config.get("scaling_factor") or 1.0
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is None or deviation is None:
        return scale, 1.0, config.get("shift_factor") or 0.0
    mean, deviation = (
        torch.tensor(values).view(1, -1, *[1] * (latents.ndim - 2)).to(latents)
        for values in (mean, deviation)
    )
    return scale, deviation, mean


def argument(pipe: DiffusionPipeline, call: Call, name: str) -> Any:
    """The value of an argument of the pipeline's call: from `call`, else its default."""
    value = call.get(name)
    return _defaults(pipe)[name] if value is None else value


def _defaults(pipe: DiffusionPipeline) -> dict[str, Any]:
    parameters = inspect.signature(type(pipe).__call__).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def _encoded(pipe: DiffusionPipeline, prompts: Sequence[str], call: Call) -> dict[str, Any]:
    """Call `encode_prompt` as the pipeline does; name -> result, names as in `Family.embeds`."""
    wanted, defaults = inspect.signature(pipe.encode_prompt).parameters, _defaults(pipe)
    given = {name: argument(pipe, call, name) for name in wanted if name in defaults}
    given["prompt"] = list(prompts)  # Z-Image writes into the list
    if "negative_prompt" in wanted and call.get("negative_prompt") is not None:
        given["negative_prompt"] = [call["negative_prompt"]] * len(prompts)
    given["device"] = pipe._execution_device
    if "do_classifier_free_guidance" in wanted:
        given["do_classifier_free_guidance"] = is_guided(pipe, call)
    values = zip(family_of(pipe).embeds, pipe.encode_prompt(**given), strict=False)
    # Without guidance, the negative embeddings are None or empty.
    return {name: value for name, value in values if name and value is not None and len(value)}


def _texts(embeds: Mapping[str, Any]) -> list[str]:
    return [name for name in embeds if name.endswith("prompt_embeds")]


def _padded(
    name: str, texts: Sequence[Tensor], mask: Tensor | None, length: int
) -> dict[str, Tensor]:
    """Pad n texts (tokens, C) to (n, length, C) and give their mask, bool (n, length).

    `mask` is that of texts that are padded already, to less than `length`.
    """
    padded = pad_sequence(list(texts), batch_first=True)
    padded = functional.pad(padded, (0, 0, 0, length - padded.shape[1]))
    sizes = [len(text) for text in texts] if mask is None else mask.sum(1).tolist()
    tokens = torch.arange(length, device=padded.device)
    return {name: padded, f"{name}_mask": torch.stack([tokens < size for size in sizes])}


def _spatial_factor(pipe: DiffusionPipeline) -> int:
    return pipe.vae_scale_factor_spatial if family_of(pipe).is_video else pipe.vae_scale_factor
