"""Whether a pipeline can be called as the settings say, known before anything is computed."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn
from transformers import CLIPTokenizer

from ecodiff.models import families
from ecodiff.models.families import Call, argument
from ecodiff.models.libraries import errors_only
from ecodiff.models.structures import denoiser_of
from ecodiff.runtime.errors import UserError, first_line

log = logging.getLogger(__name__)


def check_call(pipe: DiffusionPipeline, call: Call) -> None:
    """Raise `UserError` with the key of `call` that is wrong, and what is allowed."""
    families.arguments(pipe, {}, call)
    steps = argument(pipe, call, "num_inference_steps")
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"call: num_inference_steps is {steps}, must be a whole number from 1 on")
    families.latent_shape(pipe, call)
    negative = call.get("negative_prompt")
    if not isinstance(negative, str | None):
        raise UserError(f"call: negative_prompt is {negative!r}, must be one text for all prompts")
    if negative is not None and not families.is_guided(pipe, call):
        family = families.family_of(pipe)
        raise UserError(
            f"call: negative_prompt needs classifier-free guidance, which is off here; it is on in"
            f" models that aren't distilled, with {family.guidance} above {family.threshold:g}"
        )
    _check_length(pipe, call)
    _ask(pipe, call)


def log_cut_prompts(pipe: DiffusionPipeline, prompts: Sequence[str], call: Call) -> None:
    """Say in one line how many prompts are longer than what the text encoders read."""
    cut, limits = set[int](), list[str]()
    for name, tokenizer in _tokenizers(pipe).items():
        is_clip = isinstance(tokenizer, CLIPTokenizer)
        limit = tokenizer.model_max_length if is_clip else argument(pipe, call, _LENGTH)
        texts = tokenizer(list(prompts), verbose=False).input_ids
        long = {i for i, ids in enumerate(texts) if len(ids) > limit}
        cut |= long
        limits += [f"{name}: {limit} tokens"] if long else []
    if cut:
        log.warning(
            "%d of %d prompts are longer than what is read (%s); their ends are cut off",
            *(len(cut), len(prompts), ", ".join(limits)),
        )


def why_not_finite(pipe: DiffusionPipeline) -> str:
    """What to do about latents that are not finite, as the end of a sentence."""
    for part, module in pipe.components.items():
        for name, weight in module.named_parameters() if isinstance(module, nn.Module) else ():
            if not weight.isfinite().all():
                return f"the model's own weights are not, such as {part}: {name}"
    if denoiser_of(pipe).dtype.itemsize < 4:
        return "try dtype float32"
    return "it is float32 already: see the settings of call, such as guidance_scale"


def mixed_dtypes(pipe: DiffusionPipeline) -> str | None:
    """Which text encoder has another dtype than the denoiser, in a sentence; None: all have it.

    Without a dtype, diffusers' own models become float32 and encoders what their files hold.
    """
    wanted = denoiser_of(pipe).dtype
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and part is not None and part.dtype != wanted:
            return (
                f"pipeline: {name} is {part.dtype}, the denoiser {wanted}; load it with a dtype,"
                f" such as from_pretrained(..., dtype={wanted})"
            )
    return None


_LENGTH = "max_sequence_length"


def _check_length(pipe: DiffusionPipeline, call: Call) -> None:
    """Insist that text encoders have places for so many tokens; most pipelines don't ask."""
    length = call.get(_LENGTH)
    if length is None:
        return
    if not isinstance(length, int) or length < 1:
        raise UserError(f"call: {_LENGTH} is {length}, must be a whole number from 1 on")
    for name, tokenizer in _tokenizers(pipe).items():
        if isinstance(tokenizer, CLIPTokenizer):  # always as long as it can be
            continue
        encoder = pipe.components.get(name.replace("tokenizer", "text_encoder"))
        config = getattr(encoder, "config", None)
        config = config.get_text_config() if config is not None else None
        limit = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
        if length > limit:
            raise UserError(f"call: {_LENGTH} is {length}, but {name} takes {limit} tokens at most")


def _ask(pipe: DiffusionPipeline, call: Call) -> None:
    """Let the pipeline check its arguments, as it would once prompts are encoded."""
    check = getattr(pipe, "check_inputs", None)
    if check is None:
        return
    known = inspect.signature(type(pipe).__call__).parameters
    wanted = [name for name in inspect.signature(check).parameters if name != "kwargs"]
    given: dict[str, Any] = {
        name: argument(pipe, call, name) if name in known else None for name in wanted
    }
    height, width = families.size(pipe, call)
    given |= {"prompt": "", "height": height, "width": width}
    try:
        with errors_only():
            check(**given)
    except (ValueError, TypeError) as error:
        raise UserError(f"call: {first_line(error)}") from error


def _tokenizers(pipe: DiffusionPipeline) -> dict[str, Any]:
    parts = pipe.components.items()
    return {name: part for name, part in parts if name.startswith("tokenizer") and part}
