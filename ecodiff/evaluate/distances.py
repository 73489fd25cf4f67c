"""Distances of two sets of features, in the memory of a block of rows, whatever the sets' size.

Sets are read from where they lie, block by block. With `weights`, each distance is also that of
every resampled set: row i counts `weights[i, b]` times in resample b.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.image.kid import poly_mmd

BLOCK = 2048  # rows that are looked at together
KID_SUBSETS, KID_SUBSET = 100, 1000  # samples in each, or half of the set if that is fewer
Kernel = Callable[[Tensor, Tensor], Tensor]


class Rows:
    """The rows of several tensors (n, d), one after the other, where they lie: on disk, say."""

    def __init__(self, parts: Sequence[Tensor], device: str = "cpu") -> None:
        self.parts, self.device = parts, device
        self.starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def width(self) -> int:
        """How many features a row has."""
        return self.parts[0].shape[1]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """At most `BLOCK` rows at a time and which ones they are: float64 (b, d)."""
        for start, part in zip(self.starts.tolist(), self.parts, strict=False):
            for first in range(0, len(part), BLOCK):
                block = part[first : first + BLOCK]
                rows = slice(start + first, start + first + len(block))
                yield rows, block.to(self.device, torch.float64)

    def take(self, rows: Tensor) -> Tensor:
        """Some rows in the given order: float64 (len(rows), d)."""
        found = self.parts[0].new_empty(len(rows), self.width)
        where = torch.bucketize(rows, self.starts[1:], right=True)
        for number, part in enumerate(self.parts):
            here = where == number
            found[here] = part[rows[here] - self.starts[number]]
        return found.to(self.device, torch.float64)


def moments(rows: Rows, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of rows; with `weights` (n,), of rows that count so often."""
    total = torch.zeros(rows.width, dtype=torch.float64, device=rows.device)
    products, count = total.new_zeros(rows.width, rows.width), 0.0
    for where, block in rows.blocks():
        times = block.new_ones(len(block)) if weights is None else weights[where].to(block)
        weighted = block * times[:, None]
        total += weighted.sum(0)
        products += block.T @ weighted
        count += times.sum().item()
    mean = total / count
    return mean, (products - count * torch.outer(mean, mean)) / (count - 1)


def frechet(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """FID of two sets' `moments`: |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) (Heusel et al. 2017)."""
    (mean, first), (other_mean, second) = one, other
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return ((mean - other_mean).square().sum() + (first + second).trace() - 2 * cross).item()


def kid(real: Rows, fake: Rows) -> tuple[float, float]:
    """KID by torchmetrics' kernel: mean and deviation over subsets, which are always the same."""
    size, found = min(KID_SUBSET, len(fake) // 2), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(KID_SUBSETS):
            pair = [rows.take(torch.randperm(len(rows))[:size]) for rows in (real, fake)]
            found.append(poly_mmd(*pair))
    scores = torch.stack(found)
    return scores.mean().item(), scores.std(unbiased=False).item()


def resampled_kid(real: Rows, fake: Rows, weights: Tensor) -> Tensor:
    """KID of each resampled set, by the unbiased estimate over all pairs of rows: float64 (B,).

    A row is no pair with its own copies, or resampling would add to the distance."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(rows: Rows) -> Tensor:
        own = sum(
            ((block.square().sum(1) / rows.width + 1) ** 3) @ weights[where].to(block).square()
            for where, block in rows.blocks()
        )
        return (_sums(rows, rows, kernel, weights) - own) / pairs

    totals = weights.double().sum(0).to(real.device)
    pairs = totals.square() - weights.double().square().sum(0).to(real.device)
    across = _sums(real, fake, kernel, weights) / totals.square()
    return (within(real) + within(fake) - 2 * across).cpu()


def cmmd(real: Rows, fake: Rows, weights: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two sets of CLIP embeddings, times 1,000 (Jayasumana et
    al. 2024, "Rethinking FID", "the CMMD metric"), of each resampled set: float64 (B,).

    Embeddings are normalised; the kernel is exp(-|x - y|^2 / (2 * 10^2)); the estimate is the
    biased one, so it is never below zero.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        # Unit vectors: |x - y|^2 = 2 - 2 x.y
        return torch.exp((F.normalize(x, dim=1) @ F.normalize(y, dim=1).T - 1) / 100)

    pairs = ((real, real), (fake, fake), (real, fake))
    within_real, within_fake, across = (_sums(a, b, kernel, weights) for a, b in pairs)
    squared = weights.double().sum(0).square()
    return 1000 * (within_real + within_fake - 2 * across).cpu() / squared


def _sums(one: Rows, other: Rows, kernel: Kernel, weights: Tensor) -> Tensor:
    """The kernel summed over all pairs of rows, as often as both count: float64 (B,)."""
    total: Tensor | float = 0.0
    for rows, x in one.blocks():
        for columns, y in other.blocks():
            weighted = kernel(x, y) @ weights[columns].to(x)
            total = total + (weighted * weights[rows].to(x)).sum(0)
    return torch.as_tensor(total)


def poisson(count: int, resamples: int) -> Tensor:
    """How often each of `count` rows is drawn in each resample: uint8 (count, resamples).

    Draws are Poisson's with mean 1, so that no row depends on how many there are: the bootstrap of
    sets too large to be held. Always the same ones, so the same prompts are drawn for all variants.
    """
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.poisson(torch.ones(min(BLOCK, count - start), resamples), generator).to(torch.uint8)
        for start in range(0, count, BLOCK)
    ]
    drawn = torch.cat(parts)
    drawn[:, (drawn > 0).sum(0) < 2] = 1  # nothing can be said of fewer than two rows
    return drawn
