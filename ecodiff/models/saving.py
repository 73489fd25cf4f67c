"""The folder format of a pruned model: a diffusers pipeline folder that diffusers itself reads.

`model_index.json` names the denoiser's class `ecodiff.Pruned<Class>`, whose file lies beside the
weights (see `ecodiff.models.pruned`). It builds its dense parent from the config and narrows the
shapes before weights are read, so sharding, variants, dtypes and devices remain diffusers'
business. Safetensors only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError, safe_open

from ecodiff.models import pruned
from ecodiff.models.pruned import Pruned
from ecodiff.models.structures import Structure, discover
from ecodiff.runtime.artifacts import atomic
from ecodiff.runtime.errors import UserError, first_line

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SHARD = "5GB"  # the largest file that is written


def dense_structures(denoiser: ModelMixin) -> list[Structure]:
    """Find the structures of the dense model that a denoiser, pruned or dense, came from."""
    if not isinstance(denoiser, Pruned):
        return discover(denoiser)
    dense = next(c for c in type(denoiser).__mro__ if not issubclass(c, Pruned))
    config = {key: value for key, value in denoiser.config.items() if key != "pruned"}
    with init_empty_weights():
        return discover(dense.from_config(config))


def save(pipe: DiffusionPipeline, folder: str | Path) -> None:
    """Write a pipeline, pruned or dense, as a folder of safetensors; whole or not at all.

    Args:
        pipe: the pipeline; weights keep their dtype.
        folder: made, or replaced when it is one that ecodiff wrote.

    Raises:
        UserError: the folder holds something else.
    """
    with atomic(folder, folder=True) as scratch:
        pipe.save_pretrained(scratch, safe_serialization=True, max_shard_size=SHARD)


def load(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, encoders: bool = True
) -> DiffusionPipeline:
    """Read a pipeline folder, pruned or dense, onto the CPU.

    Args:
        folder: a diffusers pipeline folder.
        dtype: what the weights are cast to.
        encoders: false leaves text encoders and tokenizers out.

    Raises:
        UserError: files are missing, truncated or pickles, or config and weights disagree.
    """
    folder = Path(folder)
    index = _read_json(folder / "model_index.json")
    components = {k: v for k, v in index.items() if isinstance(v, list) and v[0] is not None}
    name = next((n for n in ("unet", "transformer") if n in components), None)
    if name is None:
        raise UserError(f"{folder}/model_index.json: no unet or transformer")
    absent = {} if encoders else text_parts(components)
    for component in components.keys() - absent.keys():
        if component == name or (folder / component / "config.json").exists():
            _check_weights(folder / component)
    denoiser = _load_denoiser(folder / name, *components[name], dtype)
    try:
        return DiffusionPipeline.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, **{name: denoiser}, **absent
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {first_line(error)}") from error


def text_parts(components: Iterable[str]) -> dict[str, None]:
    """Text encoders and tokenizers among a pipeline's components, as components to leave out."""
    return {name: None for name in components if name.startswith(("text_encoder", "tokenizer"))}


def _load_denoiser(folder: Path, library: str, class_name: str, dtype: torch.dtype) -> ModelMixin:
    """Load the denoiser and insist that each of its tensors came from the files."""
    try:
        model_class = getattr(pruned if library == "ecodiff" else diffusers, class_name)
    except AttributeError as error:
        raise UserError(f"{folder}: unknown denoiser class {library}.{class_name}") from error
    _read_json(folder / "config.json")
    try:
        denoiser, info = model_class.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, TypeError) as error:
        reason = first_line(error)
        raise UserError(f"{folder}: config.json and weights disagree: {reason}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            some = ", ".join(str(key) for key in sorted(info[what])[:3])
            reason = f"{len(info[what])} {what.replace('_', ' ')}, such as {some}"
            raise UserError(f"{folder}: config.json and weights disagree: {reason}")
    return denoiser


def _check_weights(folder: Path) -> None:
    """Insist on complete safetensors; diffusers' own errors don't say what is wrong."""
    if not folder.is_dir():
        raise UserError(f"{folder}: missing")
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(_read_json(index).get("weight_map", {}).values())
        for shard in sorted(shards - {file.name for file in files}):
            raise UserError(f"{folder / shard}: missing, but {index.name} names it")
    if not files:
        pickles = [file.name for file in folder.iterdir() if file.suffix in PICKLES]
        found = f"only {pickles[0]}, a pickle, which is never read" if pickles else "no weights"
        raise UserError(f"{folder}: {found}; expected *.safetensors")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            reason = first_line(error)
            raise UserError(f"{file}: truncated or not safetensors ({reason})") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content
