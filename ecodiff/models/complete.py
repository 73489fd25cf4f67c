"""Whether a pipeline folder is complete, before anything of it is used.

Libraries fill what is missing by themselves: weights with random ones, a tokenizer's words with
none. Pictures then differ without a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ecodiff.config.checks import quantiser_of
from ecodiff.models import pruned
from ecodiff.models.libraries import errors_only
from ecodiff.runtime.errors import UserError, first_line

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_components(
    folder: Path, components: Mapping[str, tuple[str, str]], variant: str | None = None
) -> dict[str, PreTrainedTokenizerBase]:
    """Insist that each component is whole, by reading all but the values of its weights.

    Args:
        folder: of the pipeline, with a folder for each component.
        components: name -> library and class, as model_index.json has them.
        variant: which weights are read, where a component has such.

    Returns:
        The tokenizers, by name.

    Raises:
        UserError: the denoiser is quantised, the first file that is missing or broken, or the
            tensors that aren't those of the component's config.
    """
    tokenizers, quantiser = {}, quantiser_of(folder)
    if quantiser:
        raise UserError(
            f"{folder} is quantised ({quantiser}), which is not read here; prune the model that"
            " it was made of, and quantise what is left (see docs/next-steps.md)"
        )
    for name, (library, class_name) in components.items():
        part, kind = folder / name, _class(folder, name, library, class_name)
        if not part.is_dir():
            raise UserError(f"{part}: missing, but model_index.json names it")
        for file in sorted(part.glob("*.json")):
            read_json(file)
        if issubclass(kind, ModelMixin | PreTrainedModel):
            read_json(part / "config.json")
            _check_tensors(part, kind, _check_weights(part, variant))
        elif issubclass(kind, PreTrainedTokenizerBase):
            tokenizers[name] = _read_tokenizer(part, kind)
    return tokenizers


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises `UserError` when it is missing or holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not JSON ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def _class(folder: Path, name: str, library: str, class_name: str) -> type:
    """A component's class; only of libraries whose code is known."""
    known = {"diffusers": diffusers, "transformers": transformers, "ecodiff": pruned}
    # A pipeline's own parts, such as safety checkers, are named after its module.
    home = known.get(library) or getattr(diffusers.pipelines, library, None)
    found = getattr(home, class_name, None)
    if not isinstance(found, type):
        raise UserError(
            f"{folder}/model_index.json: {name}: {library}.{class_name} is unknown to diffusers"
            f" {diffusers.__version__} and transformers {transformers.__version__}"
        )
    return found


def _read_tokenizer(part: Path, kind: type[PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    names = dict(kind.vocab_files_names)
    whole = names.pop("tokenizer_file", "tokenizer.json")
    read_json(part / "tokenizer_config.json")
    # Either all in one file, or what it is made from.
    absent = [name for name in names.values() if not (part / name).is_file()]
    if not (part / whole).is_file() and (absent or not names):
        instead = f", and so is {absent[0]}" if absent else ""
        raise UserError(f"{part / whole}: missing{instead}; a tokenizer needs its words")
    try:
        return kind.from_pretrained(part)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise UserError(f"{part / whole}: not a tokenizer: {first_line(error)}") from error


def _check_weights(part: Path, variant: str | None) -> str | None:
    """Insist on complete safetensors; which variant is read, None where there is none such."""
    files: dict[str | None, list[Path]] = {}
    for file in sorted(part.glob("*.safetensors")):
        files.setdefault(_variant(file.stem), []).append(file)
    variant = variant if variant in files else None
    for index in part.glob(f"*.safetensors.index{f'.{variant}' if variant else ''}.json"):
        for shard in sorted(set(read_json(index).get("weight_map", {}).values())):
            if not (part / shard).is_file():
                raise UserError(f"{part / shard}: missing, but {index.name} names it")
    if variant not in files:
        raise UserError(f"{part}: {_instead(part, files)}")
    for file in files[variant]:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            reason = first_line(error)
            raise UserError(f"{file}: truncated or not safetensors ({reason})") from error
    return variant


def _variant(stem: str) -> str | None:
    """`fp16` of `model.fp16-00001-of-00002`."""
    return re.sub(r"-\d+-of-\d+", "", stem).partition(".")[2] or None


def _instead(part: Path, files: Mapping[str | None, Any]) -> str:
    """What a folder without the wanted weights holds."""
    if files:
        return f"holds only weights of variant {', '.join(map(str, files))}; set load.variant"
    pickles = [file.name for file in part.iterdir() if file.suffix in PICKLES]
    found = f"only {pickles[0]}, a pickle, which is never read" if pickles else "no weights"
    return f"{found}; expected *.safetensors"


def _check_tensors(part: Path, kind: type, variant: str | None) -> None:
    """Insist that names and shapes in the files are those of the model that the config describes.

    The libraries compare them, since they know which names have changed; on the meta device they
    read no values.
    """
    try:
        with errors_only():
            model, info = kind.from_pretrained(
                part,
                variant=variant,
                device_map={"": "meta"},
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # a wrong value in a config may raise anything
        reason = first_line(error)
        raise UserError(f"{part}: config.json and weights disagree: {reason}") from error
    wrong = {
        "missing tensors": set(info["missing_keys"]),
        "unexpected tensors": {key for key in info["unexpected_keys"] if _matters(model, key)},
        "tensors of another shape": {key[0] for key in info["mismatched_keys"]},
    }
    for what, names in wrong.items():
        if names:
            some, more = ", ".join(sorted(names)[:3]), len(names) - 3
            reason = f"{what}: {some}{f' and {more} more' if more > 0 else ''}"
            raise UserError(f"{part}: config.json and weights disagree: {reason}")


def _matters(model: nn.Module, name: str) -> bool:
    """Whether a tensor that a model doesn't take could have changed what it computes.

    Text encoders are often saved with more than a pipeline uses: heads, the image side, positions
    that are computed now.
    """
    if isinstance(model, ModelMixin):
        return True
    names = {name, name.removeprefix(f"{model.base_model_prefix}.")}
    is_of_a_part = any(hasattr(model, one.partition(".")[0]) for one in names)
    return is_of_a_part and not names & dict(model.named_buffers()).keys()
