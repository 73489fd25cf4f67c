"""Directions of what a modulation linear reads: the units of `mask.modulation: rank`.

AdaLN linears read the conditioning alone: a smooth curve in the timestep, moved by pooled text and
guidance. Few directions of it matter, so W x + b is nearly A (B x) + b' with far fewer weights. Let
mu and C be mean and covariance of x over all calibration prompts and steps, and U S V^T the SVD of
W C^(1/2). Direction i of x is

    z_i = v_i^T C^(-1/2) (x - mu),        x = mu + sum_i C^(1/2) v_i z_i.

Directions are uncorrelated, and leaving the last ones at their mean of 0 gives the best W x of that
rank on the calibration. That is what a closed gate does, and what `LowRankLinear` computes.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ecodiff.models.units import Structure
from ecodiff.runtime.errors import UserError

# Added to C's diagonal, relative to its mean: inputs of other step counts and prompts leave the
# span of the calibration's by a little.
RIDGE = 1e-4
# Directions whose singular value is below this share of the largest are not kept apart: they move
# the output less than rounding does, and go together with whatever goes first.
SMALLEST = 1e-6

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Basis:
    """The directions of a linear's input, those that matter most first.

    Attributes:
        mean: mu, float32 (in,).
        read: C^(-1/2) v_i as rows, float32 (k, in), k <= in.
        write: C^(1/2) v_i as columns, float32 (in, k).
    """

    mean: Tensor
    read: Tensor
    write: Tensor

    def gated(self, x: Tensor, gate: Tensor) -> Tensor:
        """x with each direction multiplied by its gate; exactly x where all gates are 1.

        Args:
            x: (..., in), any float dtype.
            gate: broadcasts to (..., in); those of the directions after the k-th are not read.
        """
        mean, read, write = (part.to(x.device) for part in (self.mean, self.read, self.write))
        lost = (gate[..., : len(read)].float() - 1) * ((x.float() - mean) @ read.T)
        return (x.float() + lost @ write.T).to(x.dtype)


@torch.no_grad()
def basis_of(weight: Tensor, moments: Tensor) -> Basis:
    """The basis of a linear, computed in float64.

    Args:
        weight: W (out, in).
        moments: of its input, see `conditioned`.
    """
    count, mean = moments[-1, -1], moments[:-1, -1] / moments[-1, -1]
    covariance = moments[:-1, :-1] / count - mean.outer(mean)
    spread = covariance.diagonal().mean().clamp(min=1e-20)
    values, vectors = torch.linalg.eigh(
        covariance + RIDGE * spread * torch.eye(len(mean)).to(covariance)
    )
    roots = values.clamp(min=RIDGE * spread / 2).sqrt()
    half = vectors * roots  # C^(1/2) up to a rotation, which V takes up
    _, strengths, directions = torch.linalg.svd(weight.to(half) @ half, full_matrices=False)
    directions = directions[strengths > SMALLEST * strengths[:1]]
    read = directions @ (vectors / roots).T
    return Basis(mean.float(), read.float(), (half @ directions.T).float())


def bases_of(
    denoiser: nn.Module,
    structures: Iterable[Structure],
    moments: Mapping[str, Tensor],
    only: Container[str] | None = None,
) -> dict[str, Basis]:
    """Linear name -> its basis, for structures whose units are directions.

    Args:
        denoiser: the dense denoiser.
        structures: its structures.
        moments: linear name -> second moments of its input, see `conditioned`.
        only: names of the structures to take; None: all.

    Raises:
        UserError: `moments` have none of a linear.
    """
    chosen = [s for s in structures if only is None or s.name in only]
    linears = [s.directions_of for s in chosen if s.directions_of]
    missing = [name for name in linears if name not in moments]
    if missing:
        raise UserError(f"calibration: no moments of {missing[0]}; run the stage calibrate again")
    weights = {name: denoiser.get_submodule(name).weight.detach() for name in linears}
    return {name: basis_of(w, moments[name].to(w.device)) for name, w in weights.items()}


@contextmanager
def conditioned(denoiser: nn.Module, linears: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Inside the context the denoiser's runs are watched; on exit the dict holds the second moments
    of what the linears read: [x, 1]^T [x, 1] summed over rows, float64 (in + 1, in + 1), on the
    CPU.

    Linears that always read the same values, as all of FLUX's do, share one tensor.
    """
    leads: dict[str, str] = {}  # linear -> the first linear that reads the same
    latest: dict[str, Tensor] = {}  # what those read last
    sums: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}

    def add(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().flatten(0, -2)
        if name not in leads:
            leads[name] = next((key for key, y in latest.items() if torch.equal(x, y)), name)
        leader = leads[name]
        if leader != name and torch.equal(x, latest[leader]):
            return
        if leader != name:  # the first time that they differ
            leads[name], sums[name] = name, sums[leader] - _moments(latest[leader])
        latest[name] = x
        sums[name] = sums.get(name, 0) + _moments(x)

    handles = [
        denoiser.get_submodule(name).register_forward_pre_hook(partial(add, name))
        for name in linears
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    on_cpu = {name: value.cpu() for name, value in sums.items()}
    found |= {name: on_cpu[leader] for name, leader in leads.items()}
    few = [name for name, value in found.items() if value[-1, -1] < len(value)]
    if few:
        rows, inputs = found[few[0]][-1, -1], len(found[few[0]]) - 1
        log.warning(
            "calibrate: %s modulation linears read more directions than there are rows (%s: %.0f"
            " for %s); a ridge stands for the others, more prompts or steps would do better",
            *(len(few), few[0], rows, inputs),
        )


def _moments(x: Tensor) -> Tensor:
    rows = nn.functional.pad(x.double(), (0, 1), value=1.0)
    return rows.T @ rows


def untied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each different tensor once, under its first name; and the first name of each name."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    return {name: tensors[name] for name in first.values()}, names


def tied(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """What `untied` took apart."""
    return {name: tensors[first] for name, first in names.items()}
