"""The folder format of a pruned model: a diffusers pipeline folder that diffusers itself reads.

`model_index.json` names the denoiser's class `ecodiff.Pruned<Class>`, whose file lies beside the
weights (see `ecodiff.models.pruned`). It builds its dense parent from the config and narrows the
shapes before weights are read, so sharding, variants, dtypes and devices remain diffusers'
business. Safetensors only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors.torch import save_file
from torch import Tensor, nn

from ecodiff.models.card import CARD, card_of
from ecodiff.models.complete import check_components, read_json
from ecodiff.models.libraries import plain, refuse_offloaded
from ecodiff.models.pruned import CLASS_FILE, Pruned
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.models.units import Structure
from ecodiff.runtime.artifacts import MARKER, atomic
from ecodiff.runtime.errors import UserError, first_line

SHARD = "5GB"  # the largest file that is written
MASK = "mask.safetensors"  # beside a pruned model
INDEX = "model_index.json"


def dense_structures(denoiser: ModelMixin) -> list[Structure]:
    """Find the structures of the dense model that a denoiser, pruned or dense, came from."""
    return discover(_dense(denoiser))


def _dense(denoiser: ModelMixin) -> ModelMixin:
    """The dense model that a pruned one came from, without weights; or the denoiser itself."""
    if not isinstance(denoiser, Pruned):
        return denoiser
    dense = next(c for c in type(denoiser).__mro__ if not issubclass(c, Pruned))
    config = {key: value for key, value in denoiser.config.items() if key != "pruned"}
    with init_empty_weights():
        return dense.from_config(config)


class Beside(Protocol):
    """What lies beside a pruned model: a mask."""

    info: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write one file."""


def save(pipe: DiffusionPipeline, folder: str | Path, mask: Beside | None = None) -> None:
    """Write a pipeline, pruned or dense, as a folder of safetensors; whole or not at all.

    A pruned one gets a model card, README.md, so the folder can be published as it is.

    Args:
        pipe: the pipeline; weights keep their dtype.
        folder: made, or replaced when it is one that ecodiff wrote.
        mask: the `Mask` that it was pruned with; becomes `mask.safetensors` in the folder.

    Raises:
        UserError: the folder holds something else, or what is not saved as it is: adapters, fused
            projections, offloaded weights.
    """
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            _refuse_changed(name, plain(part))
    with atomic(folder, folder=True) as scratch, _without_wrappers(pipe):
        pipe.save_pretrained(scratch, safe_serialization=True, max_shard_size=SHARD)
        if mask is not None:
            mask.save(scratch / MASK)
        denoiser = denoiser_of(pipe)
        if isinstance(denoiser, Pruned):
            _name_class(scratch / INDEX, denoiser)
            dense = _dense(denoiser)
            by = "rank" if denoiser.config["pruned"].get("ranks") else "channels"
            beside = (MASK, mask.info.get("method")) if mask is not None else ()
            card_of(pipe, dense, discover(dense, by), *beside).save(scratch / CARD)


def save_adapter(pipe: DiffusionPipeline, adapter: Mapping[str, Tensor], folder: Path) -> None:
    """Write a LoRA adapter of a pipeline's denoiser as diffusers' `load_lora_weights` reads it.

    Args:
        pipe: the pipeline.
        adapter: `<linear>.lora_A.weight` and `<linear>.lora_B.weight`, by peft's names.
        folder: made for `pytorch_lora_weights.safetensors`.
    """
    name = next(name for name in ("unet", "transformer") if getattr(pipe, name, None) is not None)
    folder.mkdir()
    tensors = {f"{name}.{key}": value.contiguous() for key, value in adapter.items()}
    save_file(tensors, folder / LORA_WEIGHT_NAME_SAFE, metadata={"format": "pt"})


def _refuse_changed(name: str, part: nn.Module) -> None:
    """Raise `UserError` when a component would be written so that it can't be read."""
    modules = [*part.modules()]
    if any(hasattr(module, "base_layer") for module in modules):
        raise UserError(
            f"save: {name} has an adapter; merge it by fuse_lora() of the pipeline and then call"
            " unload_lora_weights(), or save it by itself"
        )
    if any(getattr(module, "fused_projections", False) for module in modules):
        raise UserError(f"save: {name}: projections were fused; load it again, save, then fuse")
    refuse_offloaded(part, f"save: {name}")


def _name_class(index: Path, denoiser: ModelMixin) -> None:
    """Say in model_index.json where `AutoModel` finds the class of a pruned denoiser.

    It looks there first, and then into no config.json. Pipelines pass over a key that is said to
    have its default value; otherwise they would warn of one that they don't know.
    """
    config = read_json(index)
    config["auto_map"] = {"AutoModel": f"{Path(CLASS_FILE).stem}.{type(denoiser).__name__}"}
    config["_use_default_values"] = {"auto_map": True}  # lists are components
    index.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@contextmanager
def _without_wrappers(pipe: DiffusionPipeline) -> Iterator[None]:
    """Inside, the pipeline's components are without the wrappers of `torch.compile`."""
    wrapped = {name: part for name, part in pipe.components.items() if plain(part) is not part}
    for name, part in wrapped.items():
        setattr(pipe, name, plain(part))
    try:
        yield
    finally:
        for name, part in wrapped.items():
            setattr(pipe, name, part)


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    encoders: bool = True,
    variant: str | None = None,
    device_map: str | None = None,
) -> DiffusionPipeline:
    """Read a pipeline folder, pruned or dense, onto the CPU or as a device map says.

    Args:
        folder: a diffusers pipeline folder.
        dtype: what the weights are cast to.
        encoders: false leaves text encoders and tokenizers out.
        variant: file variant, such as fp16; not of folders that `save` wrote, which have one only.
        device_map: how components are spread over GPUs, such as "balanced".

    Raises:
        UserError: files are missing, truncated or pickles, or config and weights disagree.
    """
    folder = Path(folder)
    index = read_json(folder / INDEX)
    components = components_of(index, folder)
    absent = {} if encoders else text_parts(components)
    wanted = {name: kind for name, kind in components.items() if name not in absent}
    if (folder / MARKER).is_file():
        variant = None
    tokenizers = check_components(folder, wanted, variant)
    options = {"variant": variant, "device_map": device_map}
    options = {key: value for key, value in options.items() if value is not None}
    try:
        return DiffusionPipeline.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, **options, **tokenizers, **absent
        )
    except Exception as error:  # a wrong value in a config may raise anything
        raise UserError(f"{folder}: does not load: {first_line(error)}") from error


def components_of(index: Mapping[str, Any], source: str | Path) -> dict[str, tuple[str, str]]:
    """The components of a model_index.json that are there: name -> library and class.

    Raises:
        UserError: the pipeline's class is not one of diffusers', or it has no denoiser.
    """
    name = index.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        raise UserError(
            f"{source}/model_index.json: _class_name: {name} is not a pipeline of diffusers"
            f" {diffusers.__version__}"
        )
    pairs = {key: tuple(value) for key, value in index.items() if isinstance(value, list)}
    components = {
        key: pair
        for key, pair in pairs.items()
        if len(pair) == 2 and all(isinstance(part, str) for part in pair)
    }
    if not {"unet", "transformer"} & components.keys():
        raise UserError(f"{source}/model_index.json: no unet or transformer")
    return components


def text_parts(components: Iterable[str]) -> dict[str, None]:
    """Text encoders and tokenizers among a pipeline's components, as components to leave out."""
    return {name: None for name in components if name.startswith(("text_encoder", "tokenizer"))}
