"""Masks that EcoDiff's authors publish, as masks of ours.

Their public code (YaNgZhAnG-V5/EcoDiff, MIT) saves with `torch.save` a list of logits, one tensor
(units,) a module, in the order in which the denoiser runs them: `*attn.pt` for attentions,
`*ff.pt` for feed-forwards and `*norm.pt` for the AdaLN linears of transformer blocks. Modules are
not named, so lengths have to tell what is what.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ecodiff.config.sections import MaskSettings
from ecodiff.mask import Mask, selected
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.models.units import Structure
from ecodiff.runtime.errors import UserError, first_line

# U-Nets have their parts in another order than they run them.
_PARTS = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}


def published_mask(
    pipe: DiffusionPipeline, files: Sequence[str | Path], sparsity: float = 0.2
) -> Mask:
    """The mask that published logits give at a sparsity.

    Their logits are ranked as ours are, all kinds together and by parameters, where the authors
    take a share of each kind's units. What no file is of stays whole; closed gates give zero.

    Args:
        pipe: the dense pipeline that they were learned on.
        files: one for each kind of structure, in any order. Read with `weights_only=True`.
        sparsity: share of the denoiser's parameters to remove.

    Raises:
        UserError: a file is missing or holds anything but logits, its lengths are not those of the
            pipeline's structures, two are of the same kind, or what `select` raises.
    """
    structures = discover(pipe)
    candidates, scores = [*_candidates(structures)], dict[str, Tensor]()
    for file in files:
        logits = _read(file)
        sizes = [len(one) for one in logits]
        fitting = [found for found in candidates if [s.units for s in found] == sizes]
        if not fitting:
            raise UserError(
                f"{file}: {len(sizes)} tensors with {sum(sizes)} logits are no kind of structure of"
                f" {type(denoiser_of(pipe)).__name__}, which has {_counted(structures)}"
            )
        names = [s.name for s in fitting[0]]
        if names[0] in scores:
            raise UserError(f"{file}: is of the {fitting[0][0].kind} too, as a file before it")
        scores |= zip(names, logits, strict=True)
    whole = {s.name: torch.full((s.units,), torch.inf) for s in structures}
    settings = MaskSettings(modulation="channels", closed="zero")
    info = {
        "model": denoiser_of(pipe).config.get("_name_or_path") or type(pipe).__name__,
        "method": "published",
        "settings": settings.model_dump(),
    }
    return selected(pipe, {**whole, **scores}, sparsity, settings, info)


def _candidates(structures: Sequence[Structure]) -> Iterator[list[Structure]]:
    """The structures that a file may be of, as they run."""
    ordered = sorted(structures, key=lambda s: _PARTS.get(s.name.partition(".")[0], 0))
    of = {kind: [s for s in ordered if s.kind == kind] for kind in ("heads", "neurons")}
    yield from of.values()
    # Older files of FLUX have no single blocks.
    yield [s for s in of["neurons"] if not s.name.startswith("single_transformer_blocks")]
    blocks = [s for s in ordered if s.kind == "modulation" and "transformer_blocks." in s.name]
    yield blocks
    yield [s for s in blocks if s.name.endswith("norm1_context.modulation")]


def _read(file: str | Path) -> list[Tensor]:
    """The logits of a file, float32."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{file}: does not load with weights_only: {first_line(error)}") from error
    is_list = isinstance(found, list) and found
    if not is_list or not all(isinstance(one, Tensor) and one.ndim == 1 for one in found):
        raise UserError(f"{file}: must be a list of tensors (units,), as EcoDiff's code saves them")
    logits = [one.detach().float() for one in found]
    if any(one.isnan().any() for one in logits):
        raise UserError(f"{file}: has logits that are not a number")
    return logits


def _counted(structures: Sequence[Structure]) -> str:
    kinds = dict.fromkeys(s.kind for s in structures)
    sizes = {kind: [s.units for s in structures if s.kind == kind] for kind in kinds}
    return ", ".join(f"{len(own)} {kind} with {sum(own)}" for kind, own in sizes.items())
