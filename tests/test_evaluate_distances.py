"""Distances of sets of features, block by block."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ecodiff.evaluate import distances
from ecodiff.evaluate.distances import (
    Rows,
    cmmd,
    frechet,
    kid,
    moments,
    poisson,
    resampled_kid,
)
from ecodiff.evaluate.memory import peak_memory


class Identity(torch.nn.Identity):
    num_features = 16


@pytest.fixture
def sets(monkeypatch: pytest.MonkeyPatch) -> tuple[Rows, Rows]:
    monkeypatch.setattr(distances, "BLOCK", 32)
    torch.manual_seed(0)
    real, fake = torch.randn(100, 16), 1.3 * torch.randn(100, 16) + 0.2
    return Rows([real[:37], real[37:]]), Rows([fake[:80], fake[80:]])


def whole(rows: Rows) -> torch.Tensor:
    return torch.cat(rows.parts)


@pytest.mark.parametrize("metric", [FrechetInceptionDistance, KernelInceptionDistance])
def test_fid_and_kid_are_torchmetrics(sets: tuple[Rows, Rows], metric: type) -> None:
    size = {"subset_size": 50} if metric is KernelInceptionDistance else {}
    theirs = metric(feature=Identity(), **size)
    for rows, is_real in zip(sets, (True, False), strict=True):
        theirs.update(whole(rows).double(), real=is_real)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = theirs.compute()
    if size:
        assert kid(*sets) == pytest.approx([one.item() for one in expected], rel=1e-9)
    else:
        assert frechet(*map(moments, sets)) == pytest.approx(expected.item(), rel=1e-9)


def test_rows_that_count_twice_are_rows_that_are_there_twice(sets: tuple[Rows, Rows]) -> None:
    weights = poisson(100, 1)
    twice = [Rows([whole(rows).repeat_interleave(weights[:, 0].long(), 0)]) for rows in sets]
    for rows, repeated in zip(sets, twice, strict=True):
        for mine, theirs in zip(moments(rows, weights[:, 0]), moments(repeated), strict=True):
            torch.testing.assert_close(mine, theirs)
    once = torch.ones(len(twice[0]), 1)
    torch.testing.assert_close(cmmd(*sets, weights), cmmd(*twice, once))


def test_resampled_kid_of_each_row_once_is_the_unbiased_estimate(sets: tuple[Rows, Rows]) -> None:
    found = resampled_kid(*sets, torch.ones(100, 1))
    expected = distances.poly_mmd(*(whole(rows).double() for rows in sets))
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


def test_draws_are_the_same_whatever_the_number_of_rows() -> None:
    assert torch.equal(poisson(5000, 3)[:2048], poisson(2048, 3))
    assert ((poisson(4, 500) > 0).sum(0) >= 2).all()  # a draw of nothing has no metrics
    assert poisson(5000, 3).double().mean().item() == pytest.approx(1, abs=0.03)


def test_memory_is_that_of_blocks_and_not_of_pairs() -> None:
    """All pairs of 20,000 pictures would take 3.2 GB."""
    rows = [Rows([torch.randn(20_000, 8)]) for _ in range(2)]
    weights = torch.ones(20_000, 2, dtype=torch.uint8)
    assert peak_memory(lambda: cmmd(*rows, weights), [], "cpu") < 200
