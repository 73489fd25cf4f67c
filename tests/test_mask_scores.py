"""Baseline scores, against sums worked out weight by weight."""

import pytest
import torch
from torch import nn

from ecodiff.mask import scores
from ecodiff.models.units import Port, Structure


class Pair(nn.Module):
    """A GEGLU-like pair: two halves of two units feed a linear of width one a unit."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(1, 4), nn.Linear(2, 3)
        self.up.weight.data = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
        self.down.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])


PAIR = Structure("pair.neurons", "neurons", 2, (Port("up", (0, 2)),), (Port("down"),), 7)


def test_magnitude_is_the_root_mean_square_of_a_units_weights():
    found = scores.magnitude(Pair(), [PAIR])["pair.neurons"]
    first = (1 + 9 + 1 + 0 + 4) / 5  # rows 0 and 2 of up, column 0 of down
    second = (4 + 16 + 0 + 1 + 4) / 5
    torch.testing.assert_close(found, torch.tensor([first, second]).sqrt())


def test_magnitude_takes_all_rows_of_a_wide_unit():
    head = Structure("pair.heads", "heads", 2, (Port("up", width=2),), (), 4)
    found = scores.magnitude(Pair(), [head])["pair.heads"]
    torch.testing.assert_close(found, torch.tensor([5 / 2, 25 / 2]).sqrt())


def test_magnitude_is_fp32_whatever_the_models_dtype():
    found = scores.magnitude(Pair().to(torch.bfloat16), [PAIR])["pair.neurons"]
    assert found.dtype == torch.float32


def test_random_scores_follow_their_seed():
    first, again, other = (scores.random([PAIR], seed)["pair.neurons"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("seed", [0, 7])
def test_random_scores_differ_between_equal_structures(seed):
    twin = Structure("twin.neurons", "neurons", 2, (), (), 7)
    found = scores.random([PAIR, twin], seed)
    assert not torch.equal(found["pair.neurons"], found["twin.neurons"])
