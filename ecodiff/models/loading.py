"""Loads pipelines from wherever they lie, and says what to do when they don't load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import SUPPORTED_DEVICE_MAP
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import nn

from ecodiff.config.checks import is_local
from ecodiff.models import saving
from ecodiff.models.complete import check_components, read_json
from ecodiff.models.libraries import hide_bars
from ecodiff.runtime.devices import choose_device
from ecodiff.runtime.errors import UserError, first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(
    source: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    device_map: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    config: str | None = None,
    encoders: bool = True,
) -> DiffusionPipeline:
    """Load a pipeline from a hub id, a folder (of a pruned model too), or a single file.

    Only safetensors weights are read. `HF_HUB_OFFLINE` is honoured.

    Args:
        source: hub id (owner/name), folder, or a .safetensors file with all weights.
        dtype: one of `DTYPES`, what weights are cast to.
        device: where the pipeline goes, see `choose_device`; not used with a device map.
        device_map: how components are spread over GPUs, such as "balanced".
        revision: commit, tag or branch on the hub.
        variant: file variant, such as fp16.
        config: single file: hub id or folder of the pipeline that the weights belong to.
        encoders: false leaves text encoders and tokenizers out: prompts were encoded before.

    Raises:
        UserError: an unknown `dtype`, `device` or `device_map`, or the source is missing, gated,
            truncated, incomplete, holds pickles only, or can't be reached; the line says what
            helps.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    if device_map not in (None, *SUPPORTED_DEVICE_MAP):
        allowed = ", ".join(dict.fromkeys(SUPPORTED_DEVICE_MAP))
        raise UserError(f"device_map: {device_map!r} is not one of {allowed}")
    device = choose_device(device) if device_map is None else device
    hide_bars()
    path, kind = Path(source), DTYPES[dtype]
    if path.is_file():
        pipe = _single_file(path, config, kind)
    else:
        options = {"variant": variant, "encoders": encoders}
        folder = path if path.is_dir() else _downloaded(str(source), revision, **options)
        pipe = saving.load(folder, dtype=kind, device_map=device_map, **options)
    if device_map:
        return pipe
    return _explained(source, lambda: pipe.to(device))


def _downloaded(source: str, revision: str | None, variant: str | None, encoders: bool) -> Path:
    """The folder of the cache that a hub's pipeline lies in, once it is there."""
    if is_local(source):
        raise UserError(f"source: {source} is neither a hub id (owner/name), a folder nor a file")
    wanted = {"revision": revision, "variant": variant}
    wanted = {key: value for key, value in wanted.items() if value is not None}
    components = saving.components_of(_index(source, revision), source)
    absent = {} if encoders else saving.text_parts(components)
    read = DiffusionPipeline.download
    return Path(_explained(source, lambda: read(source, use_safetensors=True, **wanted, **absent)))


def _single_file(path: Path, config: str | None, dtype: torch.dtype) -> DiffusionPipeline:
    if path.suffix != ".safetensors":
        raise UserError(f"source: {path}: pickles are never read; expected a .safetensors file")
    if config is None:
        raise UserError(
            f"source: {path} is a single file: set `config` to the hub id or folder of its pipeline"
        )
    index = _index(config)
    components = saving.components_of(index, config)
    if Path(config).is_dir():
        texts = {name: kind for name, kind in components.items() if name.startswith("tokenizer")}
        check_components(Path(config), texts)
    read = getattr(diffusers, index["_class_name"]).from_single_file
    pipe = _explained(path, lambda: read(str(path), config=config, torch_dtype=dtype))
    for name, part in pipe.components.items():
        tensors = part.state_dict() if isinstance(part, nn.Module) else {}
        absent = [f"{name}.{key}" for key, tensor in tensors.items() if tensor.is_meta]
        if absent:
            raise UserError(f"source: {path} lacks tensors of its pipeline, such as {absent[0]}")
    return pipe


def _index(source: str | Path, revision: str | None = None) -> dict[str, Any]:
    """The pipeline's model_index.json."""
    if Path(source).is_dir():
        return read_json(Path(source) / "model_index.json")
    wanted = {} if revision is None else {"revision": revision}
    return _explained(source, lambda: DiffusionPipeline.load_config(str(source), **wanted))


def _explained(source: str | Path, read: Callable[[], Any]) -> Any:
    """Run `read`; what it raises becomes one line that says what helps."""
    try:
        return read()
    except Exception as error:  # a wrong value in a config may raise anything
        raise UserError(f"source: {source} {_what_helps(source, error)}") from error


def _what_helps(source: str | Path, error: BaseException) -> str:
    causes = list(_causes(error))

    def is_due_to(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_due_to(GatedRepoError):
        return (
            f"is gated: accept its terms at https://huggingface.co/{source}, then run"
            " `hf auth login`"
        )
    if is_due_to(RevisionNotFoundError):
        return "has no such revision: see the branches, tags and commits on its page"
    if is_due_to(RepositoryNotFoundError):
        return "is not on the hub, or private: check the name, or run `hf auth login`"
    if is_due_to(OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError):
        return f"is not in the cache and the hub is not reached: run `hf download {source}` online"
    return f"does not load: {first_line(error)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
