"""The model card of a pruned pipeline's folder, README.md: what it says is read of the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import ModelCard, ModelCardData, metadata_load, try_to_load_from_cache
from torch import nn
from yaml import YAMLError

from ecodiff.config.checks import is_local
from ecodiff.models.pruned import CLASS_FILE, unpacked
from ecodiff.models.recognisers import norms_of
from ecodiff.models.structures import count_parameters, denoiser_of
from ecodiff.models.units import Structure

CARD = "README.md"
LICENCE = ("license", "license_name", "license_link")
_KINDS = {"heads": "attention heads", "neurons": "feed-forward neurons"}

_TEXT = """
# A smaller {model}

{base}EcoDiff has cut {sparsity:.2%} of the denoiser's parameters out of the weights: not zeros, but
smaller layers{method}.

| {model} | dense | pruned | removed |
|---|---|---|---|
| parameters | {before:,} | {after:,} | {removed:,} ({sparsity:.2%}) |
{kinds}

The row of a kind counts the parameters that could be removed of it.

## How to load

```python
import ecodiff
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS_MODEL")
```

Where ecodiff is not installed, diffusers reads the denoiser's class from the file `{place}/{code}`:

```python
pipe = DiffusionPipeline.from_pretrained("THIS_MODEL", trust_remote_code=True)
```

LoRA adapters of the dense model fit.
{beside}
## Citation

```bibtex
@inproceedings{{zhang2026learnable,
  title     = {{Learnable Sparsity for Vision Generative Models}},
  author    = {{Zhang, Yang and Jin, Er and Liang, Wenzhong and Dong, Yanfei and Khakzar, Ashkan and
               Torr, Philip and Stegmaier, Johannes and Kawaguchi, Kenji}},
  booktitle = {{International Conference on Learning Representations (ICLR)}},
  year      = {{2026}},
  url       = {{https://arxiv.org/abs/2412.02852}}
}}
```
"""

_BESIDE = """
## The mask

`{mask}` has the score of every unit that could go, and which ones stayed. It is small and remakes
any sparsity of the model it was made of, `BASE`, a hub id or a folder:

    ecodiff prune BASE {mask} OUT --percent 25
"""


def card_of(
    pipe: DiffusionPipeline,
    dense: ModelMixin,
    structures: list[Structure],
    mask: str | None = None,
    method: str | None = None,
) -> ModelCard:
    """The card of a pruned pipeline.

    Args:
        pipe: its denoiser is pruned.
        dense: the dense denoiser, on any device, `meta` too.
        structures: of the dense denoiser.
        mask: the mask's file in the folder, where there is one.
        method: how its scores were made.
    """
    denoiser = denoiser_of(pipe)
    before, after = count_parameters(dense), count_parameters(denoiser)
    base, known = _base(pipe, denoiser)
    text = _TEXT.format(
        model=type(dense).__name__,
        base=f"Made of [{base}](https://huggingface.co/{base}). " if base else "",
        method=f"; the units were chosen by the method `{method}`" if method else "",
        sparsity=(before - after) / before,
        before=before,
        after=after,
        removed=before - after,
        kinds="\n".join(_rows(denoiser, dense, structures)),
        place=next(name for name, part in pipe.components.items() if part is denoiser),
        code=CLASS_FILE,
        beside=_BESIDE.format(mask=mask) if mask else "",
    )
    data = ModelCardData(
        base_model=base, library_name="diffusers", tags=["ecodiff", "pruning"], **known
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _rows(denoiser: nn.Module, dense: nn.Module, structures: list[Structure]) -> Iterator[str]:
    """Of each kind, what could go and what went."""
    record, left = denoiser.config["pruned"], dict(denoiser.named_modules())
    for kind, name in _KINDS.items():
        alike = [s for s in structures if s.kind == kind]
        whole = sum(s.unit_parameters * s.units + _norms(s, dense) for s in alike)
        gone = sum(_gone(s, dense, record.get("kept", {})) for s in alike)
        yield from _row(name, whole, gone)
    changed = {*record.get("scattered", ()), *record.get("ranks", {})}
    parts = ((dense.get_submodule(name), left[name]) for name in changed)
    gone = sum(count_parameters(old) - count_parameters(new) for old, new in parts)
    alike = [s for s in structures if s.kind == "modulation"]
    yield from _row("modulation", sum(s.removed(s.units) for s in alike), gone)


def _row(name: str, whole: int, gone: int) -> Iterator[str]:
    if whole:
        yield f"| {name} | {whole:,} | {whole - gone:,} | {gone:,} ({gone / whole:.2%}) |"


def _gone(structure: Structure, dense: nn.Module, kept: Mapping[str, Mapping[str, str]]) -> int:
    """Parameters that a pruned model lost of a structure of heads or neurons.

    Args:
        structure: whose units.
        dense: the dense denoiser.
        kept: layer name -> which of its lines stayed, see `models.pruned`.
    """
    port, units = structure.consumers[0], structure.units
    if "columns" in kept.get(port.module, ()):
        stays = unpacked(kept[port.module]["columns"])
        units = int(stays[structure.columns(port, torch.arange(units))].sum()) // (
            len(port.offsets) * port.width
        )
    return structure.removed(structure.units - units) + (0 if units else _norms(structure, dense))


def _norms(structure: Structure, dense: nn.Module) -> int:
    """Parameters of an attention's norms, which all heads share and which go with the last one."""
    if structure.kind != "heads":
        return 0
    attention = dense.get_submodule(structure.name.removesuffix(".heads"))
    return sum(count_parameters(norm) for norm in norms_of(attention))


def _base(pipe: DiffusionPipeline, denoiser: ModelMixin) -> tuple[str | None, dict[str, str]]:
    """The hub id of the model that was pruned, and its licence; what isn't known is left out.

    A path of the hub's cache has the id in it; other paths say nothing to others.
    """
    source = denoiser.config.get("_name_or_path") or pipe.config.get("_name_or_path") or ""
    if not source or not is_local(source):
        cached = try_to_load_from_cache(source, CARD) if source else None
        return source or None, _licence(_read(cached))
    path = Path(source)
    folder = path.parent if (path.parent / "model_index.json").is_file() else path
    card = _read(folder / CARD)
    in_cache = re.search(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/", f"{path.as_posix()}/")
    if in_cache:
        return "/".join(in_cache.groups()), _licence(card)
    was_pruned = any(folder.glob(f"*/{CLASS_FILE}"))
    base = card.get("base_model") if was_pruned else None
    return base if isinstance(base, str) else None, _licence(card)


def _read(file: object) -> dict[str, Any]:
    """A card's front matter; empty where there is none that can be read."""
    try:
        return metadata_load(file) or {} if isinstance(file, str | Path) else {}
    except (OSError, ValueError, YAMLError):  # someone else's file: a card does without it
        return {}


def _licence(card: Mapping[str, Any]) -> dict[str, str]:
    return {key: card[key] for key in LICENCE if isinstance(card.get(key), str)}
