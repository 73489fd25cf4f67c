"""What can be removed from a denoiser: sets of equal units, and the linears they belong to.

| kind       | unit                             | producers lose rows    | consumers lose columns |
|------------|----------------------------------|------------------------|------------------------|
| heads      | an attention head                | q, k, v projections    | output projections     |
| neurons    | a hidden neuron of a FFN         | first linear(s)        | second linear          |
| modulation | an output channel of AdaLN, or a | its linear             | none                   |
|            | direction of what its linear reads |                      |                        |

Denoisers are recognised by their linears (`models.recognisers`), not by class names, and refused
when they are understood only in part (`models.understood`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from ecodiff.models.libraries import plain, refuse_quantised
from ecodiff.models.recognisers import RECOGNISERS, channels, directions
from ecodiff.models.understood import not_understood
from ecodiff.models.units import Structure
from ecodiff.runtime.errors import UserError

Modulation = Literal["channels", "rank"]


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
    recognisers = (*RECOGNISERS, {"channels": channels, "rank": directions}[modulation])
    structures = [
        structure
        for name, module in denoiser.named_modules()
        for recognise in recognisers
        if (structure := recognise(name, module, denoiser)) is not None
    ]
    unfit = not_understood(denoiser, structures)
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
