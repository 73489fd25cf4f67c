"""Let biases give what units that go gave on average, as gates do that close onto the mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ecodiff.prune.narrow import consumer_columns
from ecodiff.structures import Structure


@torch.no_grad()
def absorb_inputs(
    denoiser: nn.Module,
    structures: Sequence[Structure],
    kept: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
) -> None:
    """Add to each consumer's bias what the mean of its lost inputs gave, in place, before cutting.

    Args:
        denoiser: the dense denoiser.
        structures: its structures.
        kept: structure name -> int64 (k,) units that stay.
        means: consumer -> the mean of its input, (in,); those without are left as they are.
    """
    for module, columns in consumer_columns(denoiser, structures, kept).items():
        if module not in means:
            continue
        linear = denoiser.get_submodule(module)
        lost = means[module].to(linear.weight.device, torch.float64)
        lost = lost.index_fill(0, columns.to(lost.device), 0.0)
        weight = linear.weight.flatten(1).double()  # a convolution that contracts is a linear: 1x1
        linear.bias.copy_(linear.bias.double() + weight @ lost)


@torch.no_grad()
def settle_modulation(
    denoiser: nn.Module,
    structures: Sequence[Structure],
    kept: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
) -> None:
    """Let the bias of each modulation channel that goes be its mean, or 0 without one, in place.

    Args:
        denoiser, structures, kept: see `absorb_inputs`.
        means: modulation linear -> the mean of its output, (out,).
    """
    for structure in structures:
        if structure.consumers or structure.name not in kept:
            continue
        for port in structure.producers:
            linear = denoiser.get_submodule(port.module)
            if linear.bias is None:
                continue
            gone = torch.ones_like(linear.bias, dtype=torch.bool)
            gone[structure.columns(port, kept[structure.name]).to(gone.device)] = False
            mean = means.get(port.module, torch.zeros_like(linear.bias)).to(linear.bias)
            linear.bias.copy_(torch.where(gone, mean, linear.bias))
