"""Compensation against least squares on the raw activations, and for what it is meant to do."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny import calibrated, tiny

import ecodiff
from ecodiff.calibrate.grams import gather_grams
from ecodiff.config.sections import PruneSettings
from ecodiff.models.pipelines import denoise
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.prune.compensate import solve
from ecodiff.runtime.errors import UserError

RIDGE = 1e-4


def least_squares(weight, bias, x, kept, ridge):
    """The raw problem: a linear reads what it did in the dense model, in part."""
    return least_squares_to(weight, bias, x, x[:, kept], kept, ridge)


def least_squares_to(weight, bias, target, stays, kept, ridge):
    """Stacked rows of `stays` (tokens, k), which are to give what `target` (tokens, in) gave; a
    ridge as rows of their own."""
    stays = stays.double()
    penalty = math.sqrt(ridge * float((stays**2).sum(0).mean()))
    features, ridges = [stays], [penalty * torch.eye(len(kept)).double()]
    if bias is not None:
        features.append(torch.ones(len(stays), 1).double())
        ridges.append(torch.zeros(len(kept), 1).double())
    wanted = target.double() @ weight.double().T + (0 if bias is None else bias.double())
    pull = penalty * weight[:, kept].double().T
    rows = torch.cat([torch.cat(features, 1), torch.cat(ridges, 1)])
    found = torch.linalg.lstsq(rows, torch.cat([wanted, pull]), driver="gelsd").solution.T
    return found[:, : len(kept)], None if bias is None else found[:, -1]


def moments(x):
    return x.double().T @ x.double(), x.double().sum(0), len(x)


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    x = torch.randn(50, 6, generator=generator) @ mixing + 1
    weight, bias = torch.randn(3, 6, generator=generator), torch.randn(3, generator=generator)
    return weight, bias, x, torch.tensor([0, 2, 5])


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("has_bias", [True, False])
def test_solution_is_that_of_least_squares_on_raw_activations(problem, ridge, has_bias):
    weight, bias, x, kept = problem
    bias = bias if has_bias else None
    expected = least_squares(weight, bias, x, kept, ridge)
    found = solve(weight, bias, *moments(x), kept, ridge)
    assert torch.allclose(found[0].double(), expected[0], atol=1e-5)
    assert (found[1] is None) == (expected[1] is None)
    if has_bias:
        assert torch.allclose(found[1].double(), expected[1], atol=1e-5)


def test_nothing_removed_changes_nothing(problem):
    weight, bias, x, _ = problem
    found = solve(weight, bias, *moments(x), torch.arange(6), RIDGE)
    assert torch.equal(found[0], weight) and torch.equal(found[1], bias)


def test_everything_removed_leaves_the_mean_output_as_bias(problem):
    weight, bias, x, _ = problem
    found = solve(weight, bias, *moments(x), torch.arange(0), RIDGE)
    assert found[0].shape == (3, 0)
    assert torch.allclose(found[1], (x @ weight.T + bias).mean(0), atol=1e-5)


def test_a_twin_takes_over_even_where_activations_are_degenerate():
    x = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [-1.0, -1.0, 0.0]])  # the third is dead
    weight = torch.tensor([[3.0, 4.0, 5.0]])
    found, _ = solve(weight, None, *moments(x), torch.tensor([0, 2]), 0.0)
    assert torch.allclose(found, torch.tensor([[7.0, 5.0]]))


def test_fewer_rows_than_inputs_keep_what_they_do_not_tell_with_a_warning(caplog):
    pipe, calibration = calibrated("flux")
    structures = discover(pipe)
    grams = gather_grams(pipe, structures, calibration, 2)
    caplog.clear()  # of the calibration, which is small too
    enough, few = (replace(grams, count=dict.fromkeys(grams.count, n)) for n in (1000, 3))
    ecodiff.prune(tiny("flux"), random_mask(structures, {"heads"}), enough)
    assert not caplog.records
    ecodiff.prune(pipe, random_mask(structures, {"heads"}), few)
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{len(grams.gram)} linears" in line and "3 for" in line
    # One row tells of one direction; in the other the weights stay.
    x, weight = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[3.0, 4.0, 5.0]])
    found, _ = solve(weight, None, *moments(x), torch.tensor([0, 1]), 1e-9)
    assert torch.allclose(found, torch.tensor([[8.0, 4.0]]))


def record(pipe, module, calibration):
    """All rows that a linear reads while the dense model denoises."""
    rows = []
    linear = denoiser_of(pipe).get_submodule(module)
    hook = linear.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2)))
    denoise(pipe, calibration.embeds, calibration.noise, calibration.call)
    hook.remove()
    return torch.cat(rows)


def random_mask(structures, kinds):
    generator = torch.Generator().manual_seed(0)
    draws = {s.name: torch.rand(s.units, generator=generator) < 0.6 for s in structures}
    return {s.name: draws[s.name] for s in structures if s.kind in kinds}


def test_a_linear_that_two_structures_cut_is_solved_once_for_both():
    # Gathered products are float32; a smaller ridge would amplify their rounding to 1e-4.
    ridge = 1e-2
    pipe, calibration = calibrated("flux")
    structures = discover(pipe)
    grams = gather_grams(pipe, structures, calibration, 2)
    block, module = "single_transformer_blocks.0", "single_transformer_blocks.0.proj_out"
    heads = next(s for s in structures if s.name == f"{block}.attn.heads")
    kept = random_mask(structures, {"neurons"}) | {heads.name: torch.arange(heads.units) == 1}
    linear = pipe.transformer.get_submodule(module)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    neurons = heads.units * heads.width + kept[f"{block}.neurons"].nonzero().flatten()
    columns = torch.cat([torch.arange(heads.width, 2 * heads.width), neurons])
    expected = least_squares(weight, bias, record(pipe, module, calibration), columns, ridge)
    ecodiff.prune(pipe, kept, grams, PruneSettings(ridge=ridge))
    pruned = pipe.transformer.get_submodule(module)
    assert torch.allclose(pruned.weight.double(), expected[0], atol=2e-5)
    assert torch.allclose(pruned.bias.double(), expected[1], atol=2e-5)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_compensation_brings_the_pruned_latents_closer(family):
    errors = {}
    for is_compensated in (False, True):
        pipe, calibration = calibrated(family)
        structures = discover(pipe)
        grams = gather_grams(pipe, structures, calibration, 2) if is_compensated else None
        ecodiff.prune(pipe, random_mask(structures, {"heads", "neurons"}), grams)
        z0 = denoise(pipe, calibration.embeds, calibration.noise, calibration.call)
        errors[is_compensated] = float((z0 - calibration.z0).pow(2).mean())
    assert errors[True] < 0.5 * errors[False]


def test_grams_of_another_model_are_refused():
    pipe, calibration = calibrated("flux")
    grams = gather_grams(pipe, discover(pipe), calibration, 2)
    with pytest.raises(UserError, match="another model"):
        ecodiff.prune(tiny("flux", seed=1), {}, grams)


def test_incomplete_grams_are_refused():
    pipe, calibration = calibrated("flux")
    structures = discover(pipe)
    grams = gather_grams(pipe, structures[:0], calibration, 2)
    with pytest.raises(UserError, match="is missing"):
        ecodiff.prune(pipe, random_mask(structures, {"neurons"}), grams)
