"""Narrow the linears of a denoiser to the units that stay; what `prune` and `load` share.

`W[:, keep] @ x[keep] == W @ (m * x)` for a 0/1 mask m, so cutting rows of the producers and columns
of the consumers leaves what the model computes under that mask as it is (EcoDiff, "structural
pruning"). Where nothing is left to attend with, `NoHeads` stands in for the attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ecodiff.structures import Structure


class ScatterLinear(nn.Linear):
    """A linear whose pruned output channels are exactly 0.

    Args:
        linear: the dense linear, weight (out, in).
        kept: int64 (k,), its output channels that stay.

    The weight is (k, in); `index` (k,) is saved with it. The output is (..., out) as before.
    """

    def __init__(self, linear: nn.Linear, kept: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.channels = linear.out_features
        self.register_buffer("index", kept.clone())
        _take(self, 0, kept)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out), in the dtype of the narrow linear's result."""
        narrow = super().forward(input)
        full = narrow.new_zeros(*narrow.shape[:-1], self.channels)
        return full.index_copy(-1, self.index, narrow)


class NoHeads(nn.Module):
    """Attention without heads: what the masked one returns, which is not its input.

    The output projections have no columns left and give their biases. Without an output projection
    (FLUX's single blocks) the result has zero width.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.is_joint = getattr(attention, "add_k_proj", None) is not None
        self.residual_connection = getattr(attention, "residual_connection", False)
        self.rescale_output_factor = getattr(attention, "rescale_output_factor", 1.0)
        self.to_out = getattr(attention, "to_out", None)
        self.to_add_out = getattr(attention, "to_add_out", None)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return (B, S, C), or a pair of it with the context's in joint attention."""
        image = hidden_states
        if image.ndim == 4:
            image = image.flatten(2).transpose(1, 2)
        image = _project(self.to_out, image[..., :0])
        if hidden_states.ndim == 4:
            image = image.transpose(1, 2).reshape(hidden_states.shape)
        if self.residual_connection:
            image = image + hidden_states
        image = image / self.rescale_output_factor
        if self.is_joint and encoder_hidden_states is not None:
            return image, _project(self.to_add_out, encoder_hidden_states[..., :0])
        return image


def narrow(
    denoiser: nn.Module, structures: Iterable[Structure], kept: Mapping[str, Tensor]
) -> None:
    """Cut a dense denoiser in place.

    Args:
        denoiser: the dense denoiser; any device, `meta` included.
        structures: its structures.
        kept: structure name -> int64 (k,) indices of the units that stay, ascending; k may be 0.
            Structures not named stay whole.
    """
    structures = [s for s in structures if s.name in kept]
    for module, columns in consumer_columns(denoiser, structures, kept).items():
        _take(denoiser.get_submodule(module), 1, columns)
    for structure in structures:
        units = kept[structure.name]
        for port in structure.producers:
            rows, linear = structure.columns(port, units), denoiser.get_submodule(port.module)
            if structure.kind == "modulation":
                denoiser.set_submodule(port.module, ScatterLinear(linear, rows))
            else:
                _take(linear, 0, rows)
        if structure.kind == "heads":
            _set_heads(denoiser, structure, len(units))


def consumer_columns(
    denoiser: nn.Module, structures: Iterable[Structure], kept: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Find the input columns that stay of each consumer, jointly over all structures that cut it.

    Returns:
        Module name -> int64 (columns kept,), ascending, on the CPU.
    """
    stays: dict[str, Tensor] = {}
    for structure in structures:
        if structure.name not in kept:
            continue
        gone = torch.ones(structure.units, dtype=torch.bool)
        gone[kept[structure.name].cpu()] = False
        for port in structure.consumers:
            width = denoiser.get_submodule(port.module).weight.shape[1]
            mask = stays.setdefault(port.module, torch.ones(width, dtype=torch.bool))
            mask[structure.columns(port, gone.nonzero().flatten())] = False
    return {module: mask.nonzero().flatten() for module, mask in stays.items()}


def _take(layer: nn.Linear | nn.Conv2d, dim: int, kept: Tensor) -> None:
    """Keep rows (dim 0, with their biases) or columns (dim 1) of a linear or convolution."""
    layer.weight = _selected(layer.weight, dim, kept)
    if dim == 0 and layer.bias is not None:
        layer.bias = _selected(layer.bias, 0, kept)
    sizes = ("out", "in")[dim : dim + 1]
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:  # one filter a channel
        layer.groups, sizes = len(kept), ("out", "in")
    for size in sizes:
        unit = "channels" if isinstance(layer, nn.Conv2d) else "features"
        setattr(layer, f"{size}_{unit}", len(kept))


def _selected(weight: nn.Parameter, dim: int, kept: Tensor) -> nn.Parameter:
    chosen = weight.detach().index_select(dim, kept.to(weight.device)).contiguous()
    return nn.Parameter(chosen, requires_grad=weight.requires_grad)


def _set_heads(denoiser: nn.Module, structure: Structure, heads: int) -> None:
    """Tell the attention how many heads it has; diffusers' processors divide by that number."""
    name = structure.name.removesuffix(".heads")
    attention = denoiser.get_submodule(name)
    if heads == 0:
        denoiser.set_submodule(name, NoHeads(attention))
        return
    inner = heads * structure.width
    for attribute, value in (
        ("heads", heads),
        ("sliceable_head_dim", heads),
        ("inner_dim", inner),
        ("inner_kv_dim", inner),
    ):
        if hasattr(attention, attribute):
            setattr(attention, attribute, value)


def _project(output: nn.Module | None, empty: Tensor) -> Tensor:
    """Apply an output projection, which may be followed by a dropout, to a zero-width input."""
    if output is None:
        return empty
    for layer in output if isinstance(output, nn.ModuleList) else (output,):
        empty = layer(empty)
    return empty
