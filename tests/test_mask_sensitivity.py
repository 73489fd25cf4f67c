"""What a unit is worth alone, against gates that are closed a little; and where learning starts."""

import pytest
import torch
from test_mask_learn import CALL, PROMPTS, learner, recorded
from tiny import tiny

from ecodiff.calibrate import Calibration, calibrate
from ecodiff.config.sections import MaskSettings
from ecodiff.mask import make_mask
from ecodiff.mask.learn import learn_mask
from ecodiff.mask.objective import Budget, Penalty
from ecodiff.mask.sensitivity import (
    costs_of_share,
    first_logits,
    robust_weights,
    sensitivity,
    squared_gradients,
)
from ecodiff.models.structures import count_parameters, denoiser_of, discover
from ecodiff.models.units import Structure
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.state import State
from ecodiff.trajectory.directions import bases_of
from ecodiff.trajectory.gates import Gates


def units(name, count, size, kind="neurons"):
    return Structure(name, kind, count, (), (), unit_parameters=size)


@pytest.fixture(scope="module")
def flux():
    return recorded("flux")


def closed_a_little(pipe, calibration, structure, unit, by):
    """The relative error of each prompt's z0 when one gate is not 1 but 1 - by, over by squared."""
    gate = torch.ones(structure.units)
    gate[unit] -= by
    structures = discover(pipe, "rank")
    bases = bases_of(denoiser_of(pipe), structures, calibration.moments)
    gates = Gates(structures, bases=bases)
    gates.set({structure.name: gate})
    with gates.attached(denoiser_of(pipe)):
        z0 = calibration.drawn_by(pipe, batch_size=4)
    return (z0 - calibration.z0).double().square().mean().item() / by**2


@pytest.mark.slow
def test_it_is_what_closing_a_gate_costs_to_second_order():
    """One vector of signs is an unbiased estimate, so that many seeds' mean is the curvature."""
    pipe = tiny("flux").to(torch.float64)  # some units hardly matter
    calibration = calibrate(pipe, PROMPTS, [0, 1, 2, 3], CALL["flux"], batch_size=4)
    seeds, how = 60, {"batch": 4, "checkpoint": False, "modulation": "rank"}
    found = [next(squared_gradients(pipe, calibration, seed=i, **how)) for i in range(seeds)]
    variance = calibration.z0.var().item()
    for structure in discover(pipe, "rank"):
        drawn = torch.stack([one[structure.name][:, 0].mean() for one in found])
        drawn /= calibration.z0[0].numel() * variance
        exact = closed_a_little(pipe, calibration, structure, 0, by=0.5) / variance
        error = drawn.std().item() / seeds**0.5
        assert drawn.mean().item() == pytest.approx(exact, abs=4 * error, rel=0.05), structure.name


@pytest.mark.parametrize("how", [{"checkpoint": True}, {"checkpoint": True, "keep_steps": 1}])
def test_recomputing_steps_or_cutting_batches_changes_nothing(flux, how):
    plain = sensitivity(*flux, batch=4, checkpoint=False)
    other = sensitivity(*flux, batch=3, **how)
    for name, values in plain.items():
        assert values.shape == other[name].shape
        torch.testing.assert_close(other[name], values, rtol=1e-4, atol=1e-12)


def test_parameters_are_left_without_gradients(flux):
    pipe, calibration = flux
    sensitivity(pipe, calibration, batch=4)
    assert all(p.grad is None and p.requires_grad for p in denoiser_of(pipe).parameters())


def test_a_gradient_that_is_not_finite_names_its_prompts(flux):
    pipe, calibration = flux
    embeds = {key: value.clone() for key, value in calibration.embeds.items()}
    embeds["prompt_embeds"][2] = torch.nan
    broken = Calibration(**{**vars(calibration), "embeds": embeds})
    with pytest.raises(UserError, match=calibration.prompts[2]):
        sensitivity(pipe, broken, batch=1)


def test_a_cost_is_the_sensitivity_over_the_share_of_the_parameters():
    found = {"a": torch.tensor([0.2, 0.4]), "b": torch.tensor([0.6])}
    costs = costs_of_share([units("a", 2, 5), units("b", 1, 50)], found, total=100)
    assert costs["a"].tolist() == pytest.approx([4, 8])
    assert costs["b"].tolist() == pytest.approx([1.2])


def directions(inputs, outputs):
    """Units of a linear's input; two linears of full rank have inputs^2 more weights than it."""
    size, overhead = inputs + outputs, inputs**2
    return Structure("d", "modulation", inputs, (), (), size, "d", overhead)


def test_directions_that_go_together_share_a_cost_and_as_many_as_make_it_lowest():
    """By hand: 4 inputs, 8 outputs; the first to pay is the second, 2 * 12 - 16 = 8 weights gone
    for .2, a third makes 20 for .3, a fourth 32 for 1."""
    found = {"d": torch.tensor([0.1, 0.7, 0.1, 0.1])}
    costs = costs_of_share([directions(4, 8)], found, total=100)["d"]
    assert costs.tolist() == pytest.approx([1.5, 100 * 0.7 / 12, 1.5, 1.5])


def test_a_prompt_weighs_the_inverse_root_of_its_sum():
    squares = {"a": torch.tensor([[3.0, 1.0], [0.0, 0.0]]), "b": torch.tensor([[12.0], [0.0]])}
    assert robust_weights(squares).tolist() == [0.25, 0.0]


def test_the_estimate_is_the_mean_of_the_prompts_by_their_weights(flux):
    pipe, calibration = flux
    z0 = calibration.z0
    plain = sensitivity(pipe, calibration, batch=4, checkpoint=False)
    each = next(squared_gradients(pipe, calibration, batch=4, checkpoint=False))
    weights = robust_weights(each).double()
    for name, values in each.items():
        mean = (weights[:, None] * values).sum(0) / weights.sum()
        torch.testing.assert_close(
            plain[name].double() * z0[0].numel() * z0.var().item(), mean, rtol=1e-3, atol=1e-9
        )


def test_a_budgets_price_parts_what_goes_from_what_stays():
    structures = [units("a", 3, 10), units("b", 2, 20, kind="heads")]
    costs = {"a": torch.tensor([1.0, 5.0, 9.0]), "b": torch.tensor([3.0, 7.0])}
    for sparsity, price in ((0.1, 3.0), (0.3, 5.0), (0.35, 5.0), (0.4, 7.0)):
        prices = Budget(sparsity, 0.0, 1.0).prices(structures, costs, total=100)
        assert prices == {"neurons": price, "heads": price}


def test_a_penaltys_price_is_what_it_pays():
    prices = Penalty(0.5, {"heads": 0.1}, {"heads": 2.0}).prices([], {}, 100)
    assert prices == {"heads": 1.0}


def test_logits_are_the_log_of_cost_over_price_within_limits():
    logits = first_logits(torch.tensor([0.0, 1.0, 2.0, 1e30]), 2.0)
    assert logits.tolist() == pytest.approx([-8, -0.6931, 0, 8], abs=1e-4)
    assert first_logits(torch.tensor([0.0, 1.0]), 0.0).isfinite().all()


def test_learning_starts_where_the_share_below_zero_is_the_sparsity(flux, tmp_path):
    made = learner(flux, first_logit="sensitivity")
    made.begin(State(None, {}, made.gates.logits, made.optimiser))
    logits, structures = made.gates.logits, made.gates.structures
    below = sum(s.removed((logits[s.name] < 0).sum().item()) for s in structures)
    at_most_zero = sum(s.removed((logits[s.name] <= 0).sum().item()) for s in structures)
    assert below <= 0.1 * count_parameters(made.denoiser) < at_most_zero
    assert made.objective.target(0.0) == 0.1


def test_a_start_is_saved_before_the_first_iteration(flux, tmp_path, monkeypatch):
    made = learner(flux, first_logit="sensitivity")
    state = State(tmp_path / "state", {}, made.gates.logits, made.optimiser)
    made.begin(state)
    again = learner(flux, first_logit="sensitivity")
    monkeypatch.setattr("ecodiff.mask.learner.sensitivity", None)  # it is not asked again
    assert again.begin(State(state.path, {}, again.gates.logits, again.optimiser)) == []
    for name, logits in made.gates.logits.items():
        assert torch.equal(logits, again.gates.logits[name])


def test_a_flat_start_is_flat(flux):
    made = learner(flux)
    made.begin(State(None, {}, made.gates.logits, made.optimiser))
    assert all((logits == 3.0).all() for logits in made.gates.logits.values())
    assert made.objective.target(0.0) == 0.0


def test_the_method_ranks_by_cost_and_learns_nothing(flux):
    pipe, calibration = flux
    settings = MaskSettings(batch=4, seed=3)
    mask, history = make_mask(pipe, "sensitivity", 0.1, calibration=calibration, settings=settings)
    assert history.empty
    structures, total = discover(pipe, "rank"), count_parameters(denoiser_of(pipe))
    how = {"means": calibration.means, "modulation": "rank"}
    found = sensitivity(pipe, calibration, batch=4, seed=3, **how)
    expected = costs_of_share(structures, found, total)
    assert all(torch.equal(mask.scores[name], values) for name, values in expected.items())


def test_flat_start_is_the_papers_way_whatever_the_settings_say(flux):
    pipe, calibration = flux
    quick = {"iterations": 1, "batch": 2}
    found, _ = make_mask(
        pipe, "flat-start", 0.1, calibration=calibration, settings=MaskSettings(**quick)
    )
    published = MaskSettings(**quick, first_logit=3.0, closed="zero", modulation="channels")
    learned, _ = learn_mask(pipe, calibration, published, 0.1)
    assert all(torch.equal(found.scores[name], values) for name, values in learned.items())
