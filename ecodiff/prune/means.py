"""Fold the mean activation of removed units into biases, at no cost in parameters.

This makes a pruned model equal to one whose gates close onto the mean (`mask.closed: mean`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ecodiff.models.structures import modulation_linears
from ecodiff.models.units import Structure, lines_left


def of_modulation(
    structures: Sequence[Structure], means: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The entries of `Calibration.means` that belong to modulation linears."""
    linears = modulation_linears(structures)
    return {name: mean for name, mean in means.items() if name in linears}


@torch.no_grad()
def leave_means(
    denoiser: nn.Module,
    structures: Sequence[Structure],
    kept: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
) -> None:
    """Set biases so that removed units are replaced by their means; in place, before cutting.

    The bias of a consumer gains W[:, removed] @ mean[removed]. The bias of a removed modulation
    channel becomes the channel's mean output, or 0 without one.

    Args:
        denoiser: the dense denoiser.
        structures: its structures.
        kept: structure name -> int64 (k,), units that stay.
        means: module name -> mean, see `Calibration.means`. Consumers that are not named keep their
            bias.
    """
    for module, columns in lines_left(denoiser, structures, kept, "columns").items():
        if module in means:
            _absorb(denoiser.get_submodule(module), columns, means[module])
    for structure in structures:
        if structure.consumers or structure.name not in kept:
            continue
        for port in structure.producers:
            rows = structure.columns(port, kept[structure.name])
            _settle(denoiser.get_submodule(port.module), rows, means.get(port.module))


def _absorb(linear: nn.Module, columns: Tensor, mean: Tensor) -> None:
    """Add W @ mean to a consumer's bias, for the inputs that go: all but `columns`; mean (in,)."""
    lost = mean.to(linear.weight.device, torch.float64)
    lost = lost.index_fill(0, columns.to(lost.device), 0.0)
    weight = linear.weight.flatten(1).double()  # a consumer that is a convolution is 1x1
    linear.bias.copy_(linear.bias.double() + weight @ lost)


def _settle(linear: nn.Module, rows: Tensor, mean: Tensor | None) -> None:
    """Set a modulation linear's bias to the mean output (out,), or to 0, for all but `rows`."""
    if linear.bias is None:
        return
    gone = torch.ones_like(linear.bias, dtype=torch.bool)
    gone[rows.to(gone.device)] = False
    alone = torch.zeros_like(linear.bias) if mean is None else mean.to(linear.bias)
    linear.bias.copy_(torch.where(gone, alone, linear.bias))
