"""Budgets: what a mask is said to save is what the pruned model no longer does."""

import pytest
import torch
from test_prune_factorise import mask_of, some_directions
from tiny import calibrated
from torch.utils.flop_counter import FlopCounterMode

import ecodiff
from ecodiff.config.sections import MaskSettings
from ecodiff.mask import Mask, latency, make_mask
from ecodiff.mask.prices import prices_of
from ecodiff.mask.select import select
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.runtime import timing
from ecodiff.runtime.errors import UserError


def macs(pipe, calibration):
    with FlopCounterMode(display=False) as counter:
        calibration.of([0]).drawn_by(pipe, 1)
    return counter.get_total_flops() // 2


OTHERS = [pytest.param(f, marks=pytest.mark.slow) for f in ("sd3", "pixart", "qwen", "wan")]


@pytest.mark.parametrize("family", ["flux", "sdxl", "sana", *OTHERS])
@pytest.mark.parametrize("modulation", ["rank", "channels"])
def test_macs_are_those_that_the_pruned_model_no_longer_does(family, modulation):
    pipe, calibration = calibrated(family)
    structures = discover(pipe, modulation)
    prices = prices_of(pipe, structures, "macs", calibration)
    dense = macs(pipe, calibration)
    assert prices.total == dense
    if modulation == "rank":
        mask = mask_of(pipe, calibration, some_directions, ("modulation", "heads", "neurons"))
        kept = mask.kept
    else:
        kept = mask = {s.name: torch.arange(s.units) % 2 == 1 for s in structures}
    priced = prices.applied(structures)
    gone = sum(s.removed(int((~kept[s.name]).sum())) for s in priced)
    ecodiff.prune(pipe, mask)
    assert dense - macs(pipe, calibration) == gone > 0


def test_memory_is_that_of_the_weights_in_their_dtype():
    pipe, _ = calibrated("flux")
    structures = discover(pipe, "rank")
    pipe.transformer.transformer_blocks[0].ff.to(torch.bfloat16)
    prices = prices_of(pipe, structures, "memory", None)
    denoiser = denoiser_of(pipe)
    assert prices.total == sum(p.nbytes for p in denoiser.parameters())
    for s in structures:
        bytes_ = 2 if s.name == "transformer_blocks.0.ff.neurons" else 4
        assert prices.units[s.name] == bytes_ * s.unit_parameters


def test_a_mask_removes_its_share_of_the_budget_and_remembers_the_prices(tmp_path):
    pipe, calibration = calibrated("flux")
    settings = MaskSettings(budget="macs", batch=2)
    mask, _ = make_mask(pipe, "sensitivity", 0.2, calibration=calibration, settings=settings)
    mask.save(tmp_path / "mask.safetensors")
    more = Mask.load(tmp_path / "mask.safetensors").at(pipe, 0.4)
    dense = macs(pipe, calibration)
    for chosen, share in ((mask, 0.2), (more, 0.4)):
        small, _ = calibrated("flux")
        ecodiff.prune(small, chosen)
        removed = 1 - macs(small, calibration) / dense
        assert removed == pytest.approx(chosen.info["sparsity"], abs=1e-9)
        assert share <= removed < share + 0.09  # a head is 8.6 % of so small a model


def test_learning_aims_at_the_budget():
    pipe, calibration = calibrated("flux")
    settings = MaskSettings(budget="macs", batch=2, iterations=1)
    mask, history = make_mask(pipe, "ecodiff", 0.2, calibration=calibration, settings=settings)
    assert history["target_sparsity"].tolist() == [0.2]
    assert mask.info["prices"]["budget"] == "macs"


def test_a_budget_outside_the_range_is_refused_before_anything_is_scored(monkeypatch):
    pipe, calibration = calibrated("flux")
    monkeypatch.setattr("ecodiff.mask.scored", None)
    settings = MaskSettings(budget="macs", batch=2)
    with pytest.raises(UserError, match=r"the range is 0 to 0\.\d+ of the denoiser's macs"):
        make_mask(pipe, "ecodiff", 0.99, calibration=calibration, settings=settings)


@pytest.mark.parametrize("budget", ["macs", "latency"])
def test_a_budget_of_the_call_needs_a_calibration(budget):
    pipe, _ = calibrated("flux")
    with pytest.raises(UserError, match=f"mask.budget: {budget} depends on the call"):
        make_mask(pipe, "random", 0.1, settings=MaskSettings(budget=budget))


@pytest.mark.parametrize(
    "family", ["flux", pytest.param("sdxl", marks=pytest.mark.slow), OTHERS[0]]
)
def test_latency_is_the_time_that_half_a_layer_saves(family, monkeypatch):
    """A clock that counts multiply-adds: then prices are those of `macs`, but for modulation."""
    pipe, calibration = calibrated(family)

    structures = discover(pipe)
    counted = prices_of(pipe, structures, "macs", calibration)
    counter = FlopCounterMode(display=False)
    for module in (latency, timing):
        monkeypatch.setattr(module, "now", lambda _: counter.get_total_flops() / 2e9)
    monkeypatch.setattr(latency, "ROUNDS", 1)
    monkeypatch.setattr(latency, "PICTURES", 1)
    with counter:
        timed = prices_of(pipe, structures, "latency", calibration)
    assert timed.total == counted.total
    for s in structures:
        expected = 0 if s.kind == "modulation" else counted.units[s.name]
        assert timed.units[s.name] == pytest.approx(expected, abs=1), s.name
    assert timed.of["device"] == "cpu"


def test_units_that_save_no_time_stay():
    pipe, calibration = calibrated("flux")
    structures = discover(pipe, "rank")
    timed = prices_of(pipe, structures, "latency", calibration)
    scores = {s.name: torch.zeros(s.units) for s in structures}
    kept = select(timed.applied(structures), scores, 0.01, timed.total)
    assert all(kept[s.name].all() for s in structures if s.kind == "modulation")
