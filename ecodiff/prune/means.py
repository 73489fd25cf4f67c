"""Let biases give what units that go gave on average, as gates do that close onto the mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ecodiff.models.structures import Structure, modulation_linears
from ecodiff.prune.narrow import consumer_columns


def of_modulation(
    structures: Sequence[Structure], means: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Those means of a `Calibration` that are of modulation linears."""
    linears = modulation_linears(structures)
    return {name: mean for name, mean in means.items() if name in linears}


@torch.no_grad()
def leave_means(
    denoiser: nn.Module,
    structures: Sequence[Structure],
    kept: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
) -> None:
    """Let the means of what goes stay behind in biases, in place, before anything is cut.

    Consumers add what their lost inputs gave on average; a modulation channel that goes gives its
    mean, or 0 without one.

    Args:
        denoiser: the dense denoiser.
        structures: its structures.
        kept: structure name -> int64 (k,) units that stay.
        means: see `Calibration`; consumers without are left as they are.
    """
    for module, columns in consumer_columns(denoiser, structures, kept).items():
        if module in means:
            _absorb(denoiser.get_submodule(module), columns, means[module])
    for structure in structures:
        if structure.consumers or structure.name not in kept:
            continue
        for port in structure.producers:
            rows = structure.columns(port, kept[structure.name])
            _settle(denoiser.get_submodule(port.module), rows, means.get(port.module))


def _absorb(linear: nn.Module, columns: Tensor, mean: Tensor) -> None:
    """Add to a consumer's bias what the mean (in,) of its inputs gave, but for `columns`."""
    lost = mean.to(linear.weight.device, torch.float64)
    lost = lost.index_fill(0, columns.to(lost.device), 0.0)
    weight = linear.weight.flatten(1).double()  # a convolution that contracts is a linear: 1x1
    linear.bias.copy_(linear.bias.double() + weight @ lost)


def _settle(linear: nn.Module, rows: Tensor, mean: Tensor | None) -> None:
    """Make a modulation linear's bias its mean (out,), or 0 without one, but for `rows`."""
    if linear.bias is None:
        return
    gone = torch.ones_like(linear.bias, dtype=torch.bool)
    gone[rows.to(gone.device)] = False
    alone = torch.zeros_like(linear.bias) if mean is None else mean.to(linear.bias)
    linear.bias.copy_(torch.where(gone, alone, linear.bias))
