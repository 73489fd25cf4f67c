"""What can be removed from a denoiser: sets of equal units, and the linears they belong to.

| kind       | unit                             | producers lose rows    | consumers lose columns |
|------------|----------------------------------|------------------------|------------------------|
| heads      | an attention head                | q, k, v projections    | output projections     |
| neurons    | a hidden neuron of a FFN         | first linear(s)        | second linear          |
| modulation | an output channel of AdaLN, or a | its linear             | none                   |
|            | direction of what its linear reads |                      |                        |

The only file that knows architectures. It recognises them by their linears (names, sizes and
wiring), not by class names, and refuses a denoiser that it understands only in part. Sana's
feed-forward is made of convolutions; their output and input channels count as rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ecodiff.models.libraries import plain, refuse_quantised
from ecodiff.models.pruned import LowRankLinear, NoHeads, ScatterLinear
from ecodiff.runtime.errors import UserError

Kind = Literal["heads", "neurons", "modulation"]
Modulation = Literal["channels", "rank"]

_BESIDE = ("norm", "silu", "nonlinearity")  # what AdaLN's `linear` has beside it
_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k", "q_norm", "k_norm")
# The linears of feed-forwards: the first one or two read the input, the last reads the neurons.
_FEED_FORWARDS = (
    ("net.0.proj", "net.2"),
    ("w1", "w3", "w2"),  # Llama, Z-Image
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_proj", "up_proj", "linear_fc2"),  # ERNIE-Image
    ("linear_1", "linear_2", "out_projection"),  # AuraFlow
    ("linear_1", "linear_3", "linear_2"),  # Lumina 2
    ("gate_up_proj", "down_proj"),  # OmniGen
    ("linear_in", "linear_out"),  # FLUX.2
    ("ff_in", "ff_out"),  # MiniMax
    ("ffn.0", "ffn.2"),  # Wan Animate 2
    ("ff.0", "ff.3"),  # LongCat
)


@dataclass(frozen=True)
class Port:
    """A linear with the rows or columns of it that a structure's units own.

    Attributes:
        module: dotted name of the `nn.Linear` (or `nn.Conv2d`) in the denoiser.
        offsets: unit `u` owns rows (of a producer) or columns (of a consumer)
            `[o + u * width, o + (u + 1) * width)` for each offset `o`. GEGLU's projection, whose
            rows are two halves, has `(0, inner)`.
    """

    module: str
    offsets: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Structure:
    """A set of equal units that can be gated and cut out (EcoDiff, "structural pruning").

    Attributes:
        name: `<owning module>.<kind>`; unique and stable.
        kind: `heads`, `neurons` or `modulation`.
        units: how many there are.
        width: rows or columns of one unit: the head dimension, or 1.
        producers: linears that lose rows of the weight, and of the bias unless it is modulation.
        consumers: linears that lose input columns; empty for modulation.
        unit_parameters: parameters that are removed with one unit: weights, and the producers'
            biases unless it is modulation.
        directions_of: the linear whose input's directions are the units, see
            `trajectory.directions`; "" for all other structures. It becomes two linears of a rank
            as large as the number of units that stay, so one unit is a row of the first and a
            column of the second; it has no ports.
        overhead: parameters that come with the first unit that goes: of the second linear.
    """

    name: str
    kind: Kind
    units: int
    width: int
    producers: tuple[Port, ...]
    consumers: tuple[Port, ...]
    unit_parameters: int
    directions_of: str = ""
    overhead: int = 0

    @property
    def together(self) -> int:
        """How many units go together or not at all: the first that pay for the overhead."""
        return self.overhead // max(1, self.unit_parameters) + 1

    def sizes(self) -> Tensor:
        """Parameters that are removed with the first unit that goes, the second, ...: int64
        (units,). With directions, nothing before as many are gone as pay."""
        reached = torch.arange(self.units + 1) * self.unit_parameters - self.overhead
        return reached.clamp(min=0).diff()

    def removed(self, units: int) -> int:
        """Parameters that are removed with so many of the units."""
        return units * self.unit_parameters - (self.overhead if units else 0)

    def columns(self, port: Port, units: Tensor) -> Tensor:
        """Rows or columns of `port` that the given units own.

        Args:
            port: one of this structure's ports.
            units: int64 (k,), unit indices.

        Returns:
            int64 (offsets * k * width,), on the device of `units`; grouped by offset and, inside a
            group, in the order of `units`, so a linear indexed by it keeps its packed layout.
        """
        within = torch.arange(self.width, device=units.device)
        block = (units[:, None] * self.width + within).flatten()
        return torch.cat([block + offset for offset in port.offsets])


def denoiser_of(model: Any) -> nn.Module:
    """Return the U-Net or transformer of a pipeline, or `model` itself when it is a module; without
    the wrapper of `torch.compile`.

    Raises:
        UserError: the pipeline has neither.
    """
    if isinstance(model, nn.Module):
        return plain(model)
    parts = (getattr(model, name, None) for name in ("unet", "transformer"))
    denoiser = next((part for part in parts if part is not None), None)
    if denoiser is None:
        raise UserError(f"{type(model).__name__} has no denoiser: expected a unet or a transformer")
    return plain(denoiser)


def discover(model: Any, modulation: Modulation = "channels") -> list[Structure]:
    """Find all structures of a denoiser, in the order of its `named_modules`.

    Args:
        model: a diffusers pipeline or its denoiser; any device, including `meta`.
        modulation: the units of linears that read the conditioning alone: `channels` of AdaLN's
            output, as in the paper, or directions of the input (`rank`).

    Raises:
        UserError: the denoiser is quantised, or its transformer blocks are not understood, or only
            in part; the modules are named.
    """
    denoiser = denoiser_of(model)
    refuse_quantised(denoiser)
    recognisers = (*_RECOGNISERS, {"channels": _modulation, "rank": _directions}[modulation])
    structures = [
        structure
        for name, module in denoiser.named_modules()
        for recognise in recognisers
        if (structure := recognise(name, module, denoiser)) is not None
    ]
    unfit = _unfit(denoiser, structures)
    if unfit or not structures:
        names = unfit or [name for name, m in denoiser.named_modules() if isinstance(m, nn.Linear)]
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise UserError(
            f"{type(denoiser).__name__} is not supported; not understood: {listed or 'no linears'}"
            " (see docs/families.md; adapters must be merged)"
        )
    return structures


def modulation_of(names: Iterable[str]) -> Modulation:
    """Which units of modulation the names of structures are of, for `discover`."""
    return "rank" if any(name.endswith(".directions") for name in names) else "channels"


def modulation_linears(structures: Iterable[Structure]) -> set[str]:
    """Names of the linears of structures without consumers: their output channels are the units."""
    return {port.module for s in structures if not s.consumers for port in s.producers}


def count_parameters(denoiser: nn.Module) -> int:
    """Count the parameters of a module (shared ones once, buffers not)."""
    return sum(parameter.numel() for parameter in denoiser.parameters())


def maskable_share(structures: Iterable[Structure], total: int) -> float:
    """Share of `total` parameters, 0 to 1, that all units of `structures` hold."""
    return sum(s.removed(s.units) for s in structures) / total


def _heads(name: str, attention: nn.Module, denoiser: nn.Module) -> Structure | None:
    """Self, cross or joint attention; in a parallel block the consumer is the block's proj_out."""
    heads = getattr(attention, "heads", 0)
    present = [n for n in _PROJECTIONS if _linear(attention, n) is not None]
    inner = {_linear(attention, n).out_features for n in present}
    if not {"to_q", "to_k", "to_v"} <= set(present) or heads < 1 or len(inner) != 1:
        return None
    inner_dim = inner.pop()
    width = inner_dim // heads
    if inner_dim % heads or not _norms_are_per_head(attention, width):
        return None
    if _positions_are_by_head(denoiser):
        return None
    parent, _, _ = name.rpartition(".")
    if _is_parallel(denoiser.get_submodule(parent)):
        consumers = [Port(f"{parent}.proj_out")]
    else:
        outputs = [n for n in ("to_out.0", "to_add_out") if _linear(attention, n) is not None]
        if not outputs or any(_linear(attention, n).in_features != inner_dim for n in outputs):
            return None
        consumers = [Port(f"{name}.{n}") for n in outputs]
    producers = [Port(f"{name}.{n}") for n in present]
    return _structure(name, "heads", heads, width, producers, consumers, denoiser)


def _feed_forward(name: str, module: nn.Module, denoiser: nn.Module) -> Structure | None:
    """FFN of two linears or, gated as in Llama, three; the first may hold value and gate."""
    for *firsts, last in _FEED_FORWARDS:
        first = [_linear(module, n) for n in firsts]
        second = _linear(module, last)
        if second is None or second.in_features < 1 or None in first:
            continue
        inner = second.in_features
        halves, rest = divmod(first[0].out_features, inner)
        if rest or halves not in ((1, 2) if len(first) == 1 else (1,)):
            continue
        if any(linear.out_features != halves * inner for linear in first):
            continue
        offsets = tuple(i * inner for i in range(halves))
        producers = [Port(f"{name}.{n}", offsets) for n in firsts]
        return _structure(name, "neurons", inner, 1, producers, [Port(f"{name}.{last}")], denoiser)
    return None


def _conv_feed_forward(name: str, module: nn.Module, denoiser: nn.Module) -> Structure | None:
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
    consumers = [Port(f"{name}.conv_point")]
    return _structure(name, "neurons", inner, 1, producers, consumers, denoiser)


def _low_rank_modulation(name: str, module: nn.Module, denoiser: nn.Module) -> Structure | None:
    """AdaLN of two linears with nothing between them, as in Cosmos: the narrow middle is units."""
    first, second = _linear(module, "linear_1"), _linear(module, "linear_2")
    is_norm = isinstance(getattr(module, "norm", None), nn.Module)
    if first is None or second is None or not is_norm:
        return None
    if not 0 < first.out_features == second.in_features:
        return None
    producers, consumers = [Port(f"{name}.linear_1")], [Port(f"{name}.linear_2")]
    return _structure(name, "neurons", second.in_features, 1, producers, consumers, denoiser)


def _parallel_neurons(name: str, block: nn.Module, denoiser: nn.Module) -> Structure | None:
    """MLP of a parallel block: its columns follow those of the heads in the packed `proj_out`."""
    if not _is_parallel(block):
        return None
    inner, halves = _parallel_sizes(block)
    if not inner:
        return None
    consumers = [Port(f"{name}.proj_out", (block.proj_out.in_features - inner,))]
    producers = [Port(f"{name}.proj_mlp", tuple(i * inner for i in range(halves)))]
    return _structure(name, "neurons", inner, 1, producers, consumers, denoiser)


def _modulation(name: str, module: nn.Module, denoiser: nn.Module) -> Structure | None:
    """AdaLN: a linear that maps the conditioning to scales, shifts and gates."""
    path = _modulation_linear(name, module)
    if path is None:
        return None
    units = denoiser.get_submodule(path).out_features
    return _structure(name, "modulation", units, 1, [Port(path)], [], denoiser)


def _modulation_linear(name: str, module: nn.Module) -> str | None:
    """The name of AdaLN's linear: `linear`, in a module that also has a norm or activation, or the
    last layer of a Sequential with "mod" in its name."""
    beside = any(isinstance(getattr(module, n, None), nn.Module) for n in _BESIDE)
    inner = "linear"
    if beside and _linear(module, "linear_1") is not None:  # Mochi
        inner = "linear_1" if getattr(module, "linear_2", None) is None else inner
    beside = beside or name.rpartition(".")[2].startswith("adaln")  # MiniMax
    if isinstance(module, nn.Sequential) and "mod" in name.rpartition(".")[2].lower():
        inner, beside = str(len(module) - 1), True
    if isinstance(module._modules.get(inner), ScatterLinear):
        inner += ".rows"  # of an earlier pruning
    linear = _linear(module, inner) if beside else None
    return f"{name}.{inner}" if linear is not None and linear.out_features else None


def _directions(name: str, module: nn.Module, denoiser: nn.Module) -> Structure | None:
    """What a linear reads that reads the conditioning alone: AdaLN's, a residual block's projection
    of the time (SDXL), or that of all blocks (Wan)."""
    path = _modulation_linear(name, module) or next(
        (f"{name}.{n}" for n in ("time_emb_proj", "time_proj") if _linear(module, n) is not None),
        None,
    )
    if path is None:
        return None
    if path.endswith(".rows"):  # some of its channels went in an earlier pruning
        return _modulation(name, module, denoiser)
    linear = denoiser.get_submodule(path)
    rows, columns = linear.weight.shape
    # Two linears of full rank have columns^2 more weights, and always a bias.
    overhead = columns**2 + (rows if linear.bias is None else 0)
    return Structure(
        f"{path}.directions", "modulation", columns, 1, (), (), rows + columns, path, overhead
    )


_RECOGNISERS = (
    _heads,
    _feed_forward,
    _conv_feed_forward,
    _low_rank_modulation,
    _parallel_neurons,
)


def _structure(
    owner: str,
    kind: Kind,
    units: int,
    width: int,
    producers: list[Port],
    consumers: list[Port],
    denoiser: nn.Module,
) -> Structure:
    parameters = 0
    for port in producers:
        linear = denoiser.get_submodule(port.module)
        # A removed modulation channel keeps its bias, which holds the channel's mean.
        row = linear.weight[0].numel() + (linear.bias is not None and kind != "modulation")
        parameters += len(port.offsets) * width * row
    for port in consumers:
        linear = denoiser.get_submodule(port.module)
        parameters += len(port.offsets) * width * linear.weight[:, 0].numel()  # the bias stays
    name = f"{owner}.{kind}"
    return Structure(name, kind, units, width, tuple(producers), tuple(consumers), parameters)


def _linear(module: nn.Module, path: str) -> nn.Linear | None:
    for part in path.split("."):
        module = module._modules.get(part) if module is not None else None
    return module if isinstance(module, nn.Linear) and _is_plain(module) else None


def _is_plain(linear: nn.Linear) -> bool:
    """Whether rows and columns can be selected: quantisers pack weights or wrap them in a type."""
    weight = linear.weight
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return False
    shape = (linear.out_features, linear.in_features)
    return weight.is_floating_point() and tuple(weight.shape) == shape


def _is_parallel(block: nn.Module) -> bool:
    """Whether attention and MLP run in parallel into one packed `proj_out` = [heads | mlp]."""
    mlp, out = _linear(block, "proj_mlp"), _linear(block, "proj_out")
    query = _linear(block, "attn.to_q")
    if mlp is None or out is None or _linear(block, "attn.to_out.0") is not None:
        return False
    if query is None and not isinstance(block._modules.get("attn"), NoHeads):
        return False
    inner, halves = _parallel_sizes(block)
    return inner >= 0 and halves in (1, 2) and mlp.out_features == halves * inner


def _parallel_sizes(block: nn.Module) -> tuple[int, int]:
    """Neurons of a parallel block, and rows of its `proj_mlp` for each: 2 if it is gated (Ovis)."""
    query = _linear(block, "attn.to_q")
    inner = block.proj_out.in_features - (query.out_features if query is not None else 0)
    return inner, block.proj_mlp.out_features // inner if inner > 0 else 1


def _norms_are_per_head(attention: nn.Module, width: int) -> bool:
    """Whether q/k norms act on each head alone; one over all heads changes when a head goes."""
    norms = (getattr(attention, n, None) for n in NORMS)
    return all(p.numel() == width for norm in norms if norm is not None for p in norm.parameters())


def _positions_are_by_head(denoiser: nn.Module) -> bool:
    """Whether the denoiser learns rotary frequencies of each head, (3, heads, ...), as Mochi."""
    return getattr(denoiser, "pos_frequencies", None) is not None


def _unfit(denoiser: nn.Module, structures: list[Structure]) -> list[str]:
    """Names of layers with a weight matrix in transformer blocks that no structure owns.

    A transformer block is the parent of an attention. Such layers are linears or convolutions wired
    in an unknown way, fused projections, layers of an adapter or a quantiser in the place of a
    linear. If they were ignored, sparsity would not compare
    between models.
    """
    known = {port.module for s in structures for port in (*s.producers, *s.consumers)}
    known |= {s.directions_of for s in structures} | _whole_attentions(denoiser)
    known |= _cut_before(denoiser)
    blocks = tuple(
        name.rpartition(".")[0].rpartition(".")[0] + "."
        for name, _ in denoiser.named_modules()
        if (last := name.rpartition(".")[2]) in ("to_q", "q_proj") or "qkv" in last
    )
    return [
        name
        for name, module in denoiser.named_modules()
        if name.startswith(blocks)
        and name not in known
        and "emb" not in name  # of time, classes or texts: no part of a transformer block
        and _has_matrix(module)
    ]


def _whole_attentions(denoiser: nn.Module) -> set[str]:
    """Names of the linears of attentions that cannot lose heads: q/k norms over all heads (Wan),
    or positions of each head (Mochi)."""
    return {
        f"{name}.{inner}"
        for name, module in denoiser.named_modules()
        if (query := _linear(module, "to_q")) is not None
        and (heads := getattr(module, "heads", 0)) > 0
        and (
            _positions_are_by_head(denoiser)
            or (
                not _norms_are_per_head(module, query.out_features // heads)
                and _norms_are_per_head(module, query.out_features)
            )
        )
        for inner, part in module.named_modules()
        if isinstance(part, nn.Linear)
    }


def _cut_before(denoiser: nn.Module) -> set[str]:
    """Names of layers that an earlier pruning left, and of which no more can go in the same way:
    linears of low rank, rows of scattered ones, and what has no rows or columns."""
    owners = (LowRankLinear, ScatterLinear)
    modules = dict(denoiser.named_modules())
    inner = {
        f"{name}.{part}"
        for name, module in modules.items()
        if isinstance(module, owners)
        for part in module._modules
    }
    return inner | {n for n, m in modules.items() if _has_matrix(m) and not m.weight.numel()}


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim >= 2
