"""Least-squares compensation: re-solve surviving weights in closed form, without any training.

All linears at once, each as if the others were dense; `in_groups` takes one after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ecodiff.models.structures import Structure
from ecodiff.prune.narrow import consumer_columns
from ecodiff.runtime.errors import UserError

if TYPE_CHECKING:
    from ecodiff.calibrate import Grams

log = logging.getLogger(__name__)


def compensate(
    denoiser: nn.Module,
    structures: Sequence[Structure],
    kept: Mapping[str, Tensor],
    grams: Grams,
    ridge: float = 1e-4,
) -> None:
    """Re-solve each consumer for the inputs that stay, in place, before anything is cut.

    The columns that go are left as they are; `narrow` removes them. A consumer that several
    structures cut (FLUX's packed `proj_out`) is solved once for all of them.

    Args:
        denoiser: the dense denoiser.
        structures: its structures.
        kept: structure name -> int64 (k,) units that stay.
        grams: second moments and sums of the consumers' inputs in the dense model.
        ridge: see `solve`.

    Where a linear has more inputs than `grams` have rows, they say nothing of some directions, in
    which the ridge keeps the weights as they are; that is logged once.

    Raises:
        UserError: `grams` lack a consumer.
    """
    short = [name for name, gram in grams.gram.items() if grams.count[name] < len(gram)]
    if short:
        rows, inputs = grams.count[short[0]], len(grams.gram[short[0]])
        log.warning(
            "prune: %s linears have more inputs than the calibration gives rows (%s: %.0f for %s);"
            " the ridge keeps what it does not tell, more prompts would do better",
            *(len(short), short[0], rows, inputs),
        )
    for module, columns in consumer_columns(denoiser, structures, kept).items():
        linear = denoiser.get_submodule(module)
        if module not in grams.gram:
            raise UserError(f"grams: {module} is missing; gather them for all structures")
        columns = columns.to(linear.weight.device)
        weight, bias = solve(
            linear.weight.detach().flatten(1),  # a convolution that contracts is a linear: 1x1
            None if linear.bias is None else linear.bias.detach(),
            grams.gram[module].to(linear.weight.device),
            grams.total[module].to(linear.weight.device),
            grams.count[module],
            columns,
            ridge,
        )
        write(linear, columns, weight, bias)


@torch.no_grad()
def write(linear: nn.Module, columns: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Put a solution into the columns of a linear (or 1x1 convolution) that stay, in place."""
    linear.weight[:, columns] = weight.view(*weight.shape, *linear.weight.shape[2:])
    if bias is not None:
        linear.bias.copy_(bias)


def solve(
    weight: Tensor,
    bias: Tensor | None,
    gram: Tensor,
    total: Tensor,
    count: float,
    kept: Tensor,
    ridge: float,
) -> tuple[Tensor, Tensor | None]:
    """Minimise ||W X + b - W' X_kept - b'||^2 + l ||W' - W_kept||^2 over W' and b'.

    The ridge pulls towards the weights as they are, so nothing changes where nothing is removed and
    directions that the activations don't span keep their weights; b' is free.

    Args:
        weight: W (out, in).
        bias: b (out,), or None: then b' is none either.
        gram: X X^T (in, in) over all `count` calibration tokens.
        total: the sum of X over tokens, (in,).
        count: how many tokens.
        kept: int64 (k,), the inputs that stay.
        ridge: l divided by the mean of the diagonal of the kept Gram matrix.

    Returns:
        W' (out, k) and b' (out,), in the dtype of `weight`; solved in float64.
    """
    full = gram.double()
    if bias is not None:  # a constant feature: its weight is the bias
        corner = total.new_full((1, 1), count, dtype=torch.float64)
        edge = total.double()[:, None]
        full = torch.cat([torch.cat([full, edge], 1), torch.cat([edge.T, corner], 1)])
    stays = kept if bias is None else torch.cat([kept, kept.new_tensor([len(full) - 1])])
    return refit(weight, bias, kept, full[stays][:, stays], full[:, stays], ridge)


def refit(
    weight: Tensor, bias: Tensor | None, kept: Tensor, own: Tensor, cross: Tensor, ridge: float
) -> tuple[Tensor, Tensor | None]:
    """Minimise ||W T + b - W' X - b'||^2 + l ||W' - W_kept||^2 over W' and b'.

    T is what the linear read in the dense model and X what it reads now of the inputs that stay;
    with a bias, both have a constant 1 as their last feature.

    Args:
        weight, bias, kept, ridge: see `solve`.
        own: X X^T (k, k), or (k + 1, k + 1).
        cross: T X^T (in, k), or (in + 1, k + 1).

    Returns:
        W' (out, k) and b' (out,), as `solve`.
    """
    dense, now = weight.double(), weight[:, kept].double()
    if bias is not None:
        dense, now = (torch.cat([one, bias.double()[:, None]], 1) for one in (dense, now))
    penalty = torch.zeros_like(own.diagonal())
    if len(kept):
        penalty[: len(kept)] = ridge * own.diagonal()[: len(kept)].mean()
    # Solved for the change, so that nothing changes where nothing is missing.
    missing = dense @ cross - now @ own
    solved = now + _solve(own + penalty.diag(), missing.T).T
    if bias is None:
        return solved.to(weight.dtype), None
    return solved[:, :-1].to(weight.dtype), solved[:, -1].to(bias.dtype)


def _solve(normal: Tensor, right: Tensor) -> Tensor:
    """Solve a symmetric positive (semi-)definite system; without a ridge it may be singular."""
    factor, failed = torch.linalg.cholesky_ex(normal)
    if not failed:
        return torch.cholesky_solve(right, factor)
    return torch.linalg.pinv(normal, hermitian=True) @ right
