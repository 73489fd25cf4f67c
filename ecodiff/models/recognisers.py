"""Recognise the structures of one module by its linears: their names, sizes and wiring.

The only file that knows architectures; no class of a model is named. What is not recognised here is
refused by `models.understood`. Sana's feed-forward is made of convolutions; their output and input
channels count as rows and columns.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from ecodiff.models.pruned import IMAGE_OUT, TEXT_OUT, NoHeads, ScatterLinear, heads_of
from ecodiff.models.units import Kind, Port, Structure

# The linears of feed-forwards: the first one or two read the input, the last reads the neurons.
_FEED_FORWARDS = (
    ("net.0.proj", "net.2"),
    ("w1", "w3", "w2"),  # Llama, Z-Image
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_proj", "up_proj", "linear_fc2"),  # ERNIE-Image
    ("up_proj", "down_proj"),  # Cosmos 3
    ("linear_1", "linear_2", "out_projection"),  # AuraFlow
    ("linear_1", "linear_3", "linear_2"),  # Lumina 2
    ("gate_up_proj", "down_proj"),  # OmniGen
    ("linear_in", "linear_out"),  # FLUX.2
    ("ff_in", "ff_out"),  # MiniMax
    ("ffn.0", "ffn.2"),  # Wan Animate 2
    ("ff.0", "ff.3"),  # LongCat
)
# Those whose names other pairs of linears have too: only beside an attention.
_BESIDE_ATTENTION = (
    ("gate", "up", "down"),  # Krea 2
    ("gate_layer", "proj", "out"),  # Qwen-Image 2.1
    ("proj_in", "proj_out"),  # Stable Audio 3
    ("in_layer", "out_layer"),  # Kandinsky
    ("1", "3"),  # a norm, a linear, an activation, a linear: ConsisID
)
# What a projection of an attention gives, by a word of its name.
_GIVES = {"q": "q", "query": "q", "k": "k", "key": "k", "v": "v", "value": "v", "gate": "g"}
_GIVES |= {"qkv": "qkv", "kv": "kv"}
_BESIDE_MODULATION = ("norm", "silu", "nonlinearity")  # what AdaLN's `linear` has beside it


def heads(name: str, attention: nn.Module, denoiser: nn.Module) -> Structure | None:
    """Self, cross or joint attention; in a parallel block the consumer is the block's proj_out.

    Queries, keys and values have a linear each or are blocks of rows of one. Where several query
    heads share a key (grouped queries) they go with it: the group is a unit.
    """
    count, inputs = heads_of(attention), projections(attention)
    outputs, inner = _outputs(name, attention, denoiser)
    if not outputs or not inputs or inner % count or _has_positions_by_head(denoiser):
        return None
    width = inner // count
    keys = [p.out_features // width for n, p in inputs.items() if gives(n) in ("k", "v")]
    units = min([count, *keys])
    if units < 1 or count % units or not _norm_sizes(attention) <= {width}:
        return None
    group, mlp, producers = count // units, _mlp_beside(attention), []
    for path, projection in inputs.items():
        rows = projection.out_features
        if mlp and path == mlp.first:
            rows -= mlp.halves * mlp.neurons
        # Rows of a block of all units -> of one unit.
        own = {inner: width * group}
        if gives(path) in ("k", "v"):
            own[units * width] = width
        if gives(path) == "g":  # one for each head
            own[count] = group
        block = next((size for size in own if rows and rows % size == 0), 0)
        if not block:
            return None
        producers.append(Port(f"{name}.{path}", tuple(range(0, rows, block)), own[block]))
    consumers = [Port(path, (0,), width * group) for path in outputs]
    return _structure(name, "heads", units, producers, consumers, denoiser)


def feed_forward(name: str, module: nn.Module, denoiser: nn.Module) -> Structure | None:
    """FFN of two linears or, gated as in Llama, three; the first may hold value and gate."""
    beside = denoiser.get_submodule(name.rpartition(".")[0])._modules.values()
    has_attention = any(
        isinstance(p, NoHeads) or (p is not None and projections(p)) for p in beside
    )
    for *firsts, last in _FEED_FORWARDS + (_BESIDE_ATTENTION if has_attention else ()):
        first = [linear(module, n) for n in firsts]
        second = linear(module, last)
        if second is None or second.in_features < 1 or None in first:
            continue
        inner = second.in_features
        halves, rest = divmod(first[0].out_features, inner)
        if rest or halves not in ((1, 2) if len(first) == 1 else (1,)):
            continue
        if any(part.out_features != halves * inner for part in first):
            continue
        offsets = tuple(i * inner for i in range(halves))
        producers = [Port(f"{name}.{n}", offsets) for n in firsts]
        return _structure(name, "neurons", inner, producers, [Port(f"{name}.{last}")], denoiser)
    return None


def conv_feed_forward(name: str, module: nn.Module, denoiser: nn.Module) -> Structure | None:
    """FFN of convolutions, as in Sana: 1x1 to value and gate, depthwise, gating, 1x1 back."""
    parts = [module._modules.get(n) for n in ("conv_inverted", "conv_depth", "conv_point")]
    if not all(isinstance(part, nn.Conv2d) for part in parts):
        return None
    first, depth, second = parts
    inner = second.in_channels
    kernel = second.kernel_size
    if kernel != (1, 1) or not first.out_channels == depth.groups == 2 * inner:
        return None
    producers = [Port(f"{name}.{n}", (0, inner)) for n in ("conv_inverted", "conv_depth")]
    return _structure(name, "neurons", inner, producers, [Port(f"{name}.conv_point")], denoiser)


def low_rank_modulation(name: str, module: nn.Module, denoiser: nn.Module) -> Structure | None:
    """AdaLN of two linears with nothing between them, as in Cosmos: the narrow middle is units.

    If the middle is as wide as the stream, the second linear may read the normalised stream.
    """
    first, second = linear(module, "linear_1"), linear(module, "linear_2")
    stream = getattr(module._modules.get("norm"), "normalized_shape", None)
    if first is None or second is None or not stream:
        return None
    if not 0 < first.out_features == second.in_features != stream[-1]:
        return None
    producers, consumers = [Port(f"{name}.linear_1")], [Port(f"{name}.linear_2")]
    return _structure(name, "neurons", second.in_features, producers, consumers, denoiser)


def parallel_neurons(name: str, module: nn.Module, denoiser: nn.Module) -> Structure | None:
    """MLP whose columns follow those of the heads in one packed output: of a parallel block, or of
    an attention whose projection gives queries, keys, values and the MLP's input (FLUX.2)."""
    mlp = _mlp_beside(module)
    if mlp is None or not mlp.neurons:
        return None
    start = linear(module, mlp.first).out_features - mlp.halves * mlp.neurons
    rows = tuple(start + i * mlp.neurons for i in range(mlp.halves))
    columns = (linear(module, mlp.last).in_features - mlp.neurons,)
    ports = [Port(f"{name}.{mlp.first}", rows)], [Port(f"{name}.{mlp.last}", columns)]
    return _structure(name, "neurons", mlp.neurons, *ports, denoiser)


def channels(name: str, module: nn.Module, denoiser: nn.Module) -> Structure | None:
    """AdaLN: a linear that maps the conditioning to scales, shifts and gates."""
    path = _modulation_linear(name, module)
    if path is None:
        return None
    units = denoiser.get_submodule(path).out_features
    return _structure(name, "modulation", units, [Port(path)], [], denoiser)


def directions(name: str, module: nn.Module, denoiser: nn.Module) -> Structure | None:
    """What a linear reads that reads the conditioning alone: AdaLN's, a residual block's projection
    of the time (SDXL), or that of all blocks (Wan)."""
    path = _modulation_linear(name, module) or next(
        (f"{name}.{n}" for n in ("time_emb_proj", "time_proj") if linear(module, n) is not None),
        None,
    )
    if path is None:
        return None
    if path.endswith(".rows"):  # some of its channels went in an earlier pruning
        return channels(name, module, denoiser)
    layer = denoiser.get_submodule(path)
    rows, columns = layer.weight.shape
    # Two linears of full rank have columns^2 more weights, and always a bias.
    overhead = columns**2 + (rows if layer.bias is None else 0)
    return Structure(
        f"{path}.directions", "modulation", columns, (), (), rows + columns, path, overhead
    )


RECOGNISERS = (heads, feed_forward, conv_feed_forward, low_rank_modulation, parallel_neurons)


def linear(module: nn.Module, path: str) -> nn.Linear | None:
    """The linear at a path within a module, if its rows and columns can be selected: quantisers
    pack weights or wrap them in a type."""
    for part in path.split(".") if path else ():
        module = module._modules.get(part) if module is not None else None
    if not isinstance(module, nn.Linear):
        return None
    weight = module.weight
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return None
    shape = (module.out_features, module.in_features)
    return module if weight.is_floating_point() and tuple(weight.shape) == shape else None


def words(name: str) -> set[str]:
    """The words of the last part of a module's name, in lower case."""
    return {*re.split(r"[_\d]+", name.rpartition(".")[2].lower())}


def gives(name: str) -> str:
    """What a projection of an attention gives, by its name: "q", "k", "v", "g" for a gate, or
    several, as "qkv"; "" for other linears."""
    found = {_GIVES[word] for word in words(name) & _GIVES.keys()}
    return found.pop() if len(found) == 1 else ""


def projections(attention: nn.Module) -> dict[str, nn.Linear]:
    """The linears that give an attention's queries, keys, values and gates, by name; empty where
    they are no attention, or one was fused of others that are still there."""
    found = {n: linear(attention, n) for n in attention._modules if gives(n)}
    found = {n: part for n, part in found.items() if part is not None}
    parts = Counter((frozenset(words(n) - _GIVES.keys()), x) for n in found for x in gives(n))
    is_whole = {"q", "k", "v"} <= {part for _, part in parts} and max(parts.values()) == 1
    return found if is_whole and heads_of(attention) else {}


def norms_of(attention: nn.Module) -> Iterator[nn.Module]:
    """An attention's norms of queries and keys."""
    for name, part in attention._modules.items():
        found = words(name)
        if part is not None and "norm" in found and "pre" not in found and gives(name):
            yield part


def heads_are_bound(attention: nn.Module, denoiser: nn.Module) -> bool:
    """Whether no head of an attention can go without a change of the others: q/k norms span all of
    them (Wan), or the denoiser learns rotary frequencies of each (Mochi)."""
    inputs = projections(attention)
    if not inputs or _has_positions_by_head(denoiser):
        return bool(inputs)
    all_of = {part.out_features for n, part in inputs.items() if gives(n) in ("q", "k")}
    width = max(all_of, default=0) // heads_of(attention)
    sizes = _norm_sizes(attention)
    return not sizes <= {width} and sizes <= {width, *all_of}


def _has_positions_by_head(denoiser: nn.Module) -> bool:
    return getattr(denoiser, "pos_frequencies", None) is not None  # (3, heads, ...)


def _norm_sizes(attention: nn.Module) -> set[int]:
    """Over how many channels the norms of queries and keys act."""
    sizes = set[int]()
    for norm in norms_of(attention):
        shape = getattr(norm, "normalized_shape", getattr(norm, "dim", ()))
        fixed = {shape[-1]} if isinstance(shape, tuple) and shape else set()
        sizes |= {parameter.numel() for parameter in norm.parameters()} or fixed
    return sizes


class _Mlp(NamedTuple):
    """An MLP whose linears hold heads too: which linears, its neurons, rows for each of them."""

    first: str
    last: str
    neurons: int
    halves: int


def _mlp_beside(module: nn.Module) -> _Mlp | None:
    """The MLP of a parallel block, or that of an attention with one fused projection."""
    for first, last in (("proj_mlp", "proj_out"), ("to_qkv_mlp_proj", "to_out")):
        reads, writes = linear(module, first), linear(module, last)
        if reads is None or writes is None:
            continue
        rows = reads.out_features
        if last == "to_out":
            inner = heads_of(module) * getattr(module, "head_dim", 0)
            rows -= 3 * inner
        else:
            attention = module._modules.get("attn", module)
            query = linear(attention, "to_q")
            inner = query.out_features if query is not None else 0
            is_block = query is not None or isinstance(attention, NoHeads)
            if not is_block or linear(attention, "to_out.0") is not None:
                continue
        neurons = writes.in_features - inner
        halves = rows // neurons if neurons > 0 else 1
        if neurons >= 0 and halves in (1, 2) and rows == halves * neurons:
            return _Mlp(first, last, neurons, halves)
    return None


def _outputs(name: str, attention: nn.Module, denoiser: nn.Module) -> tuple[list[str], int]:
    """Names of an attention's output projections, and how many of their columns are of heads."""
    parent = name.rpartition(".")[0]
    query = linear(attention, "to_q")
    if _mlp_beside(denoiser.get_submodule(parent)) and query is not None:
        return [f"{parent}.proj_out"], query.out_features
    mlp = _mlp_beside(attention)
    if mlp:
        return [f"{name}.{mlp.last}"], linear(attention, mlp.last).in_features - mlp.neurons
    names = [n if linear(attention, n) is not None else f"{n}.0" for n in (*IMAGE_OUT, *TEXT_OUT)]
    found = {n: part for n in names if (part := linear(attention, n)) is not None}
    sizes = {part.in_features for part in found.values()}
    return [f"{name}.{n}" for n in found if len(sizes) == 1], max(sizes, default=0)


def _modulation_linear(name: str, module: nn.Module) -> str | None:
    """The name of AdaLN's linear: one that has modulation in its name, or is the last in a module
    that has; or `linear` in a module that also has a norm or activation."""
    kinds, inner = nn.Linear | ScatterLinear, None
    own = [n for n, part in module._modules.items() if isinstance(part, kinds)]
    if words(name) & {"mod", "modulation", "adaln"}:
        own = [""] if isinstance(module, kinds) else own
        inner = own[-1] if len(own) == 1 or (own and isinstance(module, nn.Sequential)) else None
    elif any(isinstance(getattr(module, n, None), nn.Module) for n in _BESIDE_MODULATION):
        one = "linear_1" if "linear_1" in own and "linear_2" not in own else "linear"  # Mochi
        inner = one if one in own else None
    if inner is None:
        return None
    if isinstance(module.get_submodule(inner), ScatterLinear):  # of an earlier pruning
        inner = f"{inner}.rows".removeprefix(".")
    layer = linear(module, inner)
    is_left = layer is not None and layer.out_features
    return ".".join(filter(None, (name, inner))) if is_left else None


def _structure(
    owner: str,
    kind: Kind,
    units: int,
    producers: list[Port],
    consumers: list[Port],
    denoiser: nn.Module,
) -> Structure:
    parameters = 0
    for port in producers:
        layer = denoiser.get_submodule(port.module)
        # A removed modulation channel keeps its bias, which holds the channel's mean.
        row = layer.weight[0].numel() + (layer.bias is not None and kind != "modulation")
        parameters += len(port.offsets) * port.width * row
    for port in consumers:
        layer = denoiser.get_submodule(port.module)
        # The bias stays.
        parameters += len(port.offsets) * port.width * layer.weight[:, 0].numel()
    return Structure(f"{owner}.{kind}", kind, units, tuple(producers), tuple(consumers), parameters)
