"""Least-squares compensation: re-solve surviving weights in closed form, without any training.

    W', b' = argmin ||W X + b - W' X_kept - b'||^2 + ridge,   X = inputs in the dense model

from the Gram matrix X X^T over all denoising steps. Here each linear is solved as if all the others
were dense; `in_groups` solves one group after the other, on the model as compensated so far.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ecodiff.models.units import Structure, lines_left
from ecodiff.runtime.errors import UserError

if TYPE_CHECKING:
    from ecodiff.calibrate.grams import Grams

log = logging.getLogger(__name__)


def compensate(
    denoiser: nn.Module,
    structures: Sequence[Structure],
    kept: Mapping[str, Tensor],
    grams: Grams,
    ridge: float = 1e-4,
) -> None:
    """Re-solve each consumer for the inputs that stay, in place, before anything is cut.

    Only the columns that stay are written; `narrow` removes the others. A consumer of several
    structures (FLUX's packed `proj_out`) is solved once for all of them.

    A linear with more inputs than `grams` has rows (calibration tokens) is underdetermined: the
    ridge keeps its weights in the directions without data, and a warning is logged.

    Args:
        denoiser: the dense denoiser.
        structures: its structures.
        kept: structure name -> int64 (k,), units that stay.
        grams: Gram matrices and sums of the consumers' inputs in the dense model.
        ridge: relative strength of the ridge, see `solve`.

    Raises:
        UserError: a consumer is missing in `grams`.
    """
    short = [name for name, total in grams.total.items() if grams.count[name] < len(total)]
    if short:
        rows, inputs = grams.count[short[0]], len(grams.total[short[0]])
        log.warning(
            "prune: %s linears have more inputs than the calibration gives rows (%s: %.0f for %s);"
            " the ridge keeps what it does not tell, more prompts would do better",
            *(len(short), short[0], rows, inputs),
        )
    for module, columns in lines_left(denoiser, structures, kept, "columns").items():
        linear = denoiser.get_submodule(module)
        if module not in grams.gram:
            raise UserError(f"grams: {module} is missing; gather them for all structures")
        columns = columns.to(linear.weight.device)
        weight, bias = solve(
            linear.weight.detach().flatten(1),  # a consumer that is a convolution is 1x1
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
    """Write a solution into the given columns of a linear (or 1x1 convolution), in place.

    Args:
        linear: the linear.
        columns: int64 (k,), the input columns that stay.
        weight: (out, k).
        bias: (out,), or None.
    """
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

    The ridge pulls W' towards the present weights, not towards 0: nothing changes where nothing is
    removed, and directions that the activations do not span keep their weights. b' is not
    penalised.

    Args:
        weight: W (out, in).
        bias: b (out,), or None: then b' is None as well.
        gram: X X^T (in, in), summed over `count` calibration tokens.
        total: sum of X over the same tokens, (in,).
        count: number of tokens.
        kept: int64 (k,), the inputs that stay.
        ridge: l relative to the mean diagonal of the kept Gram matrix, so that it does not depend
            on the scale of the activations or the number of tokens.

    Returns:
        W' (out, k) and b' (out,), in the dtypes of `weight` and `bias`; solved in float64.
    """
    full = gram.double()
    if bias is not None:  # append a constant input of 1, whose weight is the bias
        corner = total.new_full((1, 1), count, dtype=torch.float64)
        edge = total.double()[:, None]
        full = torch.cat([torch.cat([full, edge], 1), torch.cat([edge.T, corner], 1)])
    stays = kept if bias is None else torch.cat([kept, kept.new_tensor([len(full) - 1])])
    return refit(weight, bias, kept, full[stays][:, stays], full[:, stays], ridge)


def refit(
    weight: Tensor, bias: Tensor | None, kept: Tensor, own: Tensor, cross: Tensor, ridge: float
) -> tuple[Tensor, Tensor | None]:
    """Minimise ||W T + b - W' X - b'||^2 + l ||W' - W_kept||^2 over W' and b'.

    T are the linear's inputs in the dense model, X its inputs in the pruned model, of those that
    stay. With a bias, both have a constant 1 as their last feature.

    Args:
        weight: W (out, in), the dense weight.
        bias: b (out,), or None.
        kept: int64 (k,), the inputs that stay.
        own: X X^T, float64 (k, k); with a bias (k + 1, k + 1).
        cross: T X^T, float64 (in, k); with a bias (in + 1, k + 1).
        ridge: l relative to the mean diagonal of X X^T.

    Returns:
        W' (out, k) and b' (out,), or None for b' without a bias; in the dtypes of `weight`, `bias`.
    """
    dense, now = weight.double(), weight[:, kept].double()
    if bias is not None:
        dense, now = (torch.cat([one, bias.double()[:, None]], 1) for one in (dense, now))
    penalty = torch.zeros_like(own.diagonal())
    if len(kept):
        penalty[: len(kept)] = ridge * own.diagonal()[: len(kept)].mean()
    # Solve for the change of the weights: it is exactly zero where nothing is removed.
    missing = dense @ cross - now @ own
    solved = now + _solve(own + penalty.diag(), missing.T).T
    if bias is None:
        return solved.to(weight.dtype), None
    return solved[:, :-1].to(weight.dtype), solved[:, -1].to(bias.dtype)


def _solve(normal: Tensor, right: Tensor) -> Tensor:
    """Solve a symmetric positive semi-definite system, by the pseudo-inverse where it is singular
    (without a ridge)."""
    factor, failed = torch.linalg.cholesky_ex(normal)
    if not failed:
        return torch.cholesky_solve(right, factor)
    return torch.linalg.pinv(normal, hermitian=True) @ right
