"""Whether a denoiser's transformer blocks are understood whole.

A transformer block is the parent of an attention. Each of its layers with a weight matrix belongs
to a structure, or is known to stay whole. What is neither is wired in an unknown way: a fused
projection, a layer of an adapter or a quantiser in the place of a linear. If it were ignored,
sparsity would not compare between models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from ecodiff.models.pruned import LowRankLinear, ScatterLinear
from ecodiff.models.recognisers import gives, heads_are_bound, words
from ecodiff.models.units import Structure

# A module that is called so embeds times, classes or texts.
_EMBEDDERS = {"emb", "embed", "embedder", "embedding", "embeddings"}
_TABLE = 16  # vectors in a table, such as those of scales, shifts and gates
# Layers that map a block's stream to itself, or join another one to it.
_JOINTS = ("skip_linear", "conv_temp", "proj_in", "proj_out")


def not_understood(denoiser: nn.Module, structures: Iterable[Structure]) -> list[str]:
    """Names of layers in transformer blocks that no structure owns and that don't stay whole."""
    ports = {port.module for s in structures for port in (*s.producers, *s.consumers)}
    known = ports | {s.directions_of for s in structures}
    known |= {*_bound(denoiser), *_cut_before(denoiser), *_joints(denoiser), *_routers(denoiser)}
    blocks = tuple(f"{name}." for name in blocks_of(denoiser) if name)
    return [
        name
        for name, module in denoiser.named_modules()
        if name.startswith(blocks)
        and name not in known
        and not any(words(part) & _EMBEDDERS for part in name.split(".")[:-1])
        and not isinstance(module, nn.Embedding)
        and _has_matrix(module)
    ]


def blocks_of(denoiser: nn.Module) -> set[str]:
    """Names of the transformer blocks: what holds a module with a projection to queries."""
    return {
        name.rpartition(".")[0].rpartition(".")[0]
        for name, _ in denoiser.named_modules()
        if "q" in gives(name)
    }


def _bound(denoiser: nn.Module) -> Iterator[str]:
    """The linears of attentions that cannot lose heads."""
    for name, module in denoiser.named_modules():
        if heads_are_bound(module, denoiser):
            for inner, part in module.named_modules():
                if isinstance(part, nn.Linear):
                    yield f"{name}.{inner}"


def _joints(denoiser: nn.Module) -> Iterator[str]:
    for name, module in denoiser.named_modules():
        if name.rpartition(".")[2] in _JOINTS and isinstance(module, nn.Linear | nn.Conv2d):
            rows, columns = module.weight.shape[:2]
            if columns in (rows, 2 * rows):
                yield name


def _routers(denoiser: nn.Module) -> Iterator[str]:
    """What chooses among experts."""
    for name, module in denoiser.named_modules():
        if "experts" in module._modules and "gate" in module._modules:
            yield f"{name}.gate"


def _cut_before(denoiser: nn.Module) -> Iterator[str]:
    """Layers that an earlier pruning left, and of which no more can go in the same way: linears of
    low rank, rows of scattered ones, and what has no rows or columns."""
    for name, module in denoiser.named_modules():
        if isinstance(module, LowRankLinear | ScatterLinear):
            yield from (f"{name}.{part}" for part in module._modules)
        elif 0 in getattr(getattr(module, "weight", None), "shape", ()):
            yield name


def _has_matrix(module: nn.Module) -> bool:
    """Whether a layer has a weight matrix, or a parameter of its own that is more than a table of a
    few vectors: experts packed in one tensor."""
    weight = getattr(module, "weight", None)
    own = (p for p in module._parameters.values() if p is not None and p.ndim > 1)
    is_large = any(p.numel() > _TABLE * p.shape[-1] for p in own)
    return (isinstance(weight, Tensor) and weight.ndim > 1) or is_large
