"""The objective's parts, by hand and by differences."""

import math

import pytest
import torch

from ecodiff.config.sections import MaskSettings
from ecodiff.mask.learner import optimiser_of
from ecodiff.mask.objective import Budget, Penalty, distortion, expected_sparsity
from ecodiff.models.units import Port, Structure
from ecodiff.trajectory.gates import Gates, sample_gate

HEADS = Structure("a.heads", "heads", 2, (), (Port("out", width=4),), unit_parameters=10)
MODULATION = Structure("b.modulation", "modulation", 3, (), (), unit_parameters=5)


def test_distortion_is_the_relative_mean_square():
    z0, dense = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    assert distortion(z0, dense, 0.5).item() == pytest.approx(5.0)


def test_distortion_of_half_precision_latents_is_computed_in_fp32():
    dense = torch.full((1000,), 1.0, dtype=torch.bfloat16)
    value = distortion(dense + 2**-7, dense, 1.0)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(2**-14, rel=1e-6)


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("logit", [-6.0, 0.0, 3.0])
def test_expected_sparsity_is_exact(floor, logit):
    """Fault 4: an L0 formula that ignores the noise floor."""
    gates = Gates([HEADS, MODULATION], logit, floor)
    ours, exact = expected_sparsity(gates, 100), gates.expected_sparsity(100)
    assert {kind: share.item() for kind, share in ours.items()} == pytest.approx(
        {kind: share.item() for kind, share in exact.items()}, abs=1e-7
    )


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5])
def test_the_first_update_has_a_gradient_for_every_kind(floor):
    """Fault 5: the modulation regulariser never reached the loss; and a floor flattens P."""
    gates = Gates([HEADS, MODULATION], 3.0, floor)
    sum(expected_sparsity(gates, 100).values()).backward()
    for structure in (HEADS, MODULATION):
        assert (gates.logits[structure.name].grad < 0).all()


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_gradients_are_those_of_the_exact_value_where_it_is_not_flat(floor):
    ours, exact = (Gates([HEADS, MODULATION], 0.2 - 1.99, floor) for _ in range(2))
    sum(expected_sparsity(ours, 100).values()).backward()
    sum(exact.expected_sparsity(100).values()).backward()
    for name in ours.logits:
        torch.testing.assert_close(ours.logits[name].grad, exact.logits[name].grad)


def test_the_penalty_weighs_the_share_that_is_kept():
    """Fault 3: an L1 of raw logits in the place of L0."""
    penalty = Penalty(2.0, {"heads": 0.2, "neurons": 0.15}, {"heads": 1.0, "neurons": 3.0})
    removed = {"heads": torch.tensor(0.1), "neurons": torch.tensor(0.05)}
    assert penalty.regulariser(removed, 0.5).item() == pytest.approx(2 * (0.1 + 3 * 0.1))
    assert math.isnan(penalty.target(0.5))


def test_the_budget_rises_linearly_then_stays():
    budget = Budget(sparsity=0.2, warmup=0.25, lr=1.0)
    targets = [budget.target(progress) for progress in (0.0, 0.125, 0.25, 1.0)]
    assert targets == pytest.approx([0, 0.1, 0.2, 0.2])
    assert Budget(0.2, 0.0, 1.0).target(0.0) == 0.2


def test_the_budgets_terms_are_those_of_the_equation():
    budget = Budget(sparsity=0.3, warmup=0.0, lr=1.0, linear=2.0, quadratic=5.0)
    value = budget.regulariser({"heads": torch.tensor(0.1)}, 1.0).item()
    assert value == pytest.approx(2 * 0.2 + 5 * 0.04)


def test_multipliers_ascend_by_their_own_gradient():
    budget = Budget(sparsity=0.3, warmup=0.0, lr=0.5, linear=1.0, quadratic=1.0)
    budget.ascend(0.1, 1.0)
    assert (budget.linear, budget.quadratic) == pytest.approx((1.1, 1.02))
    budget.ascend(0.5, 1.0)  # too sparse: the linear one falls
    assert budget.linear == pytest.approx(1.0)


@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.4])
@pytest.mark.parametrize(("iterations", "lr"), [(50, 0.2), (100, 0.1), (400, 0.1)])
def test_the_budget_lands_by_itself_and_removes_what_matters_least(sparsity, iterations, lr):
    """Units of known importance stand in for a model: their distortion is known in closed form."""
    generator = torch.Generator().manual_seed(0)
    importance = torch.exp(2 * torch.randn(600, generator=generator))
    structure = Structure("a.neurons", "neurons", 600, (), (), unit_parameters=1)
    settings = MaskSettings(iterations=iterations)
    gates = Gates([structure], 3.0, settings.noise_floor)
    logits = gates.logits["a.neurons"]
    optimiser = optimiser_of([{"params": [logits], "lr": lr}])
    budget = Budget(sparsity, settings.warmup, settings.multiplier_lr)
    for i in range(iterations):
        optimiser.zero_grad()
        gate = sample_gate(logits, torch.rand(4, 600, generator=generator), gates.floor)
        loss = (importance * (1 - gate).square()).sum(1).mean() / importance.sum()
        expected = expected_sparsity(gates, 660)
        (loss + budget.regulariser(expected, (i + 1) / iterations)).backward()
        optimiser.step()
        budget.ascend(expected["neurons"].item(), (i + 1) / iterations)
    assert expected["neurons"].item() == pytest.approx(sparsity, abs=0.005)
    count = int(sparsity * 660)
    removed = importance[logits.detach().argsort()[:count]].sum()
    assert removed < 1.1 * importance.sort().values[:count].sum()
