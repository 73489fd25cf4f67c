"""Selection, worked by hand: sparsity counts parameters, and overshoots by less than a unit."""

import pytest
import torch

from ecodiff.mask.select import removed_share, select
from ecodiff.models.units import Port, Structure
from ecodiff.runtime.errors import UserError

HEADS = Structure("a.heads", "heads", 3, (), (Port("out", width=4),), unit_parameters=10)
NEURONS = Structure("b.neurons", "neurons", 4, (), (), unit_parameters=3)
BOTH = [HEADS, NEURONS]  # 42 of 100 parameters are maskable
SCORES = {"a.heads": torch.tensor([0.5, 0.1, 0.9]), "b.neurons": torch.tensor([0.2, 0.0, 0.6, 0.3])}


def kept(sparsity, scores=SCORES, **options):
    found = select(BOTH, scores, sparsity, 100, **options)
    return found["a.heads"].tolist(), found["b.neurons"].tolist()


@pytest.mark.parametrize(
    ("sparsity", "heads", "neurons"),
    [
        (0.0, [1, 1, 1], [1, 1, 1, 1]),
        (0.01, [1, 1, 1], [1, 0, 1, 1]),  # 3 removed for 1
        (0.03, [1, 1, 1], [1, 0, 1, 1]),  # exactly reached: no further unit
        (0.04, [1, 0, 1], [1, 0, 1, 1]),  # 13
        (0.16, [1, 0, 1], [0, 0, 1, 1]),  # 16
        (0.20, [0, 0, 1], [0, 0, 1, 0]),  # 19, then a head: 29
        (0.42, [0, 0, 0], [0, 0, 0, 0]),  # all there is
    ],
)
def test_lowest_scores_go_first_across_kinds(sparsity, heads, neurons):
    """Faults 18 and 19: a keep count of 0 kept nearly all; sparsity counted units, per type."""
    assert kept(sparsity) == ([bool(k) for k in heads], [bool(k) for k in neurons])


def test_overshoot_is_less_than_the_last_unit():
    scores = {
        k: torch.randn(len(v), generator=torch.Generator().manual_seed(1))
        for k, v in SCORES.items()
    }
    for percent in range(43):
        found = select(BOTH, scores, percent / 100, 100)
        removed = round(100 * removed_share(BOTH, found, 100))
        gone = [
            (v.item(), s.unit_parameters)
            for s in BOTH
            for v, keep in zip(scores[s.name], found[s.name], strict=True)
            if not keep
        ]
        last = max(gone)[1] if gone else 1
        assert percent <= removed < percent + last


def test_rounding_does_not_ask_for_another_unit():
    """0.28 * 75 is a little more than 21 in floating point; seven units of three are 21."""
    ten = Structure("c.neurons", "neurons", 10, (), (), unit_parameters=3)
    found = select([ten], {"c.neurons": torch.arange(10.0)}, 0.28, 75)
    assert int((~found["c.neurons"]).sum()) == 7


@pytest.mark.parametrize("sparsity", [0.43, 1.5, -0.1, float("nan")])
def test_an_impossible_sparsity_states_the_maximum(sparsity):
    with pytest.raises(UserError, match=r"0 to 0\.4200"):
        kept(sparsity)


def test_the_floor_keeps_the_best_units_of_each_structure():
    assert kept(0.29, floor=1) == ([False, False, True], [False, False, True, False])
    with pytest.raises(UserError, match=r"0 to 0\.2900 .* 1 units"):
        kept(0.3, floor=1)


def test_a_floor_above_the_units_keeps_them_all():
    assert kept(0.0, floor=9) == ([True] * 3, [True] * 4)
    with pytest.raises(UserError, match=r"0 to 0\.0000"):
        kept(0.1, floor=9)


def test_structure_scope_takes_the_same_share_of_each():
    scores = {"a.heads": SCORES["a.heads"] + 100, "b.neurons": SCORES["b.neurons"]}
    # By rank within: neuron 1/8, head 1/6, neuron 3/8, head 1/2, neuron 5/8, head 5/6, neuron 7/8.
    assert kept(0.16, scores, scope="structure") == (
        [True, False, True],
        [False, False, True, True],
    )
    assert kept(0.17, scores, scope="structure") == (
        [False, False, True],
        [False, False, True, True],
    )


def test_ties_go_in_order_and_scores_are_not_clamped():
    """Fault 18: clamping before ranking makes ties of very sure units."""
    logits = {"a.heads": torch.zeros(3) - 40, "b.neurons": torch.tensor([-80.0, -60, -50, 50])}
    assert kept(0.09, logits) == ([True] * 3, [False, False, False, True])
    assert kept(0.10, logits) == ([False, True, True], [False, False, False, True])


def aligned(units, sparsity, align=4, **options):
    """Which neurons stay of one FFN with rising scores, and three heads that score above them."""
    ffn = Structure("f.neurons", "neurons", units, (), (), unit_parameters=1)
    scores = {"f.neurons": torch.arange(float(units)), "a.heads": torch.full((3,), 100.0)}
    found = select([ffn, HEADS], scores, sparsity, 100, align=align, **options)
    return int(found["f.neurons"].sum()), int(found["a.heads"].sum())


@pytest.mark.parametrize(
    ("units", "sparsity", "left"),
    [
        (12, 0.0, (12, 3)),
        (12, 0.01, (8, 3)),  # four go for one
        (12, 0.04, (8, 3)),
        (12, 0.05, (4, 3)),
        (10, 0.0, (10, 3)),  # untouched, though no multiple
        (10, 0.01, (8, 3)),  # the first two make it a multiple
        (10, 0.03, (4, 3)),
        (10, 0.11, (0, 2)),  # no neurons are left: now heads, one by one
    ],
)
def test_aligned_neurons_leave_a_multiple(units, sparsity, left):
    assert aligned(units, sparsity) == left


def test_an_aligned_floor_is_rounded_up():
    assert aligned(12, 0.08, floor=3) == (4, 3)
    with pytest.raises(UserError, match=r"0 to 0\.0800"):  # a third group would leave none
        aligned(12, 0.09, floor=3)


def test_aligned_neurons_are_ranked_by_their_mean():
    a, b = (Structure(f"{n}.neurons", "neurons", 2, (), (), unit_parameters=1) for n in "ab")
    scores = {"a.neurons": torch.tensor([0.0, 9.0]), "b.neurons": torch.tensor([2.0, 3.0])}
    found = select([a, b], scores, 0.2, 10, align=2)
    assert found["a.neurons"].tolist() == [True, True]
    assert found["b.neurons"].tolist() == [False, False]


def test_aligned_heads_leave_a_multiple_of_columns():
    """Heads of four columns go in pairs for a multiple of eight, once their number is even."""
    six = Structure("s.heads", "heads", 6, (), (Port("out", width=4),), unit_parameters=10)
    odd = Structure("o.heads", "heads", 3, (), (Port("out", width=4),), unit_parameters=10)
    scores = {"s.heads": torch.arange(6.0), "o.heads": torch.arange(3.0) + 100}

    def left(sparsity):
        found = select([six, odd], scores, sparsity, 100, align=8)
        return [int(found[name].sum()) for name in scores]

    assert [left(s) for s in (0.01, 0.3, 0.6, 0.61, 0.75)] == [
        [4, 3],
        [2, 3],
        [0, 3],
        [0, 2],
        [0, 0],
    ]


def test_what_is_excluded_stays_whole():
    assert kept(0.1, exclude=["a.*"])[0] == [True] * 3
    assert kept(0.1, exclude=["?.neurons"]) == ([True, False, True], [True] * 4)
    with pytest.raises(UserError, match=r"0 to 0\.1200"):
        kept(0.2, exclude=["a.*"])


def test_limits_are_shares_of_each_structure():
    assert kept(0.26, limits={"neurons": 0.5, "heads": 0.67}) == (
        [False, False, True],
        [False, False, True, True],
    )
    assert kept(0.10, limits={"heads": 0.3}) == ([True, True, True], [False] * 4)
    assert kept(0.12, limits={"heads": 1 / 3, "b.*": 0.25}) == (
        [True, False, True],
        [True, False, True, True],
    )
    with pytest.raises(UserError, match=r"0 to 0\.1300"):
        kept(0.2, limits={"heads": 1 / 3, "b.*": 0.5, "*": 0.34})


def test_a_pattern_that_means_nothing_is_refused():
    for options in ({"exclude": ["c.*"]}, {"limits": {"c.*": 0.5}}):
        with pytest.raises(UserError, match=r"'c\.\*' means no structure .* a.heads, b.neurons"):
            kept(0.1, **options)


def test_infinite_scores_rank_but_nan_does_not():
    scores = {**SCORES, "b.neurons": torch.tensor([float("inf"), float("-inf"), 0, 0])}
    assert kept(0.03, scores)[1] == [True, False, True, True]
    with pytest.raises(UserError, match=r"b\.neurons .* not a number"):
        kept(0.03, {**SCORES, "b.neurons": torch.full((4,), float("nan"))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.heads": torch.zeros(2)}, r"a\.heads .*\(2,\), must be \(3,\)"),
        ({"c.heads": torch.zeros(2)}, r"c\.heads is no structure"),
    ],
)
def test_scores_of_another_model_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        kept(0.1, {**SCORES, **change})


def test_a_structure_without_scores_is_named():
    with pytest.raises(UserError, match=r"b\.neurons has no scores"):
        kept(0.1, {"a.heads": SCORES["a.heads"]})


DIRECTIONS = Structure("d", "modulation", 4, (), (), 12, "d", overhead=16)  # 4 in, 8 out


@pytest.mark.parametrize(
    ("sparsity", "gone"),
    [(0.01, [0, 2]), (0.08, [0, 2]), (0.09, [0, 2, 3]), (0.20, [0, 2, 3]), (0.32, [0, 1, 2, 3])],
)
def test_directions_go_from_as_many_on_as_pay(sparsity, gone):
    """Two of four leave 2 * 12 weights of 32, a third 12 fewer, the fourth none."""
    scores = {"d": torch.tensor([0.1, 0.7, 0.1, 0.4])}
    found = select([DIRECTIONS], scores, sparsity, 100)
    assert (~found["d"]).nonzero().flatten().tolist() == gone
    assert removed_share([DIRECTIONS], found, 100) == [0, 0, 0.08, 0.2, 0.32][len(gone)]


def test_directions_of_one_score_go_together_before_any_alone():
    """The float32 mean of equal scores can be above them."""
    many = Structure("d", "modulation", 96, (), (), 384, "d", overhead=9216)
    scores = {"d": torch.full((96,), 2.8447746444726363e-05)}
    kept = select([many], scores, 1e-5, 30_000)["d"]
    assert (~kept).sum() == 25
