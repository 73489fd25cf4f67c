"""Least-squares compensation: re-solve surviving weights in closed form, without any training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ecodiff.errors import UserError
from ecodiff.prune.narrow import consumer_columns
from ecodiff.structures import Structure

if TYPE_CHECKING:
    from ecodiff.calibrate import Grams


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

    Raises:
        UserError: `grams` lack a consumer.
    """
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
        with torch.no_grad():
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
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[kept] = False
    gone = gone.nonzero().flatten()
    gram, total = gram.double(), total.double()
    normal, right = gram[kept][:, kept], gram[gone][:, kept]
    penalty = ridge * normal.diagonal().mean() if len(kept) else 0.0
    normal.diagonal().add_(penalty)
    if bias is not None:  # a constant feature: its weight is the bias
        edge = total[kept, None]
        corner = total.new_full((1, 1), count)
        normal = torch.cat([torch.cat([normal, edge], 1), torch.cat([edge.T, corner], 1)])
        right = torch.cat([right, total[gone, None]], 1)
    change = weight[:, gone].double() @ _solve(normal, right.T).T
    solved = (weight[:, kept].double() + change[:, : len(kept)]).to(weight.dtype)
    if bias is None:
        return solved, None
    return solved, (bias.double() + change[:, -1]).to(bias.dtype)


def _solve(normal: Tensor, right: Tensor) -> Tensor:
    """Solve a symmetric positive (semi-)definite system; without a ridge it may be singular."""
    factor, failed = torch.linalg.cholesky_ex(normal)
    if not failed:
        return torch.cholesky_solve(right, factor)
    return torch.linalg.pinv(normal, hermitian=True) @ right
