"""Compensation in groups, against the one at once and against least squares on raw activations."""

import copy

import pytest
import torch
from test_prune_compensate import least_squares_to, random_mask, record
from tiny import calibrated

import ecodiff
from ecodiff.calibrate.grams import gather_grams
from ecodiff.config.sections import PruneSettings
from ecodiff.models.pipelines import denoise
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.prune.in_groups import _split
from ecodiff.trajectory.rollout import dense_steps

RIDGE = 1e-2  # products are float32; a smaller ridge amplifies their rounding


def error(pipe, calibration):
    z0 = denoise(pipe, calibration.embeds, calibration.noise, calibration.call)
    return float((z0 - calibration.z0).pow(2).mean())


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_one_group_is_all_at_once(family):
    pipe, calibration = calibrated(family)
    kept = random_mask(discover(pipe), {"heads", "neurons"})
    other = copy.deepcopy(pipe)
    settings = PruneSettings(ridge=RIDGE, groups=1, batch_size=1)
    ecodiff.prune(pipe, kept, calibration, settings)
    grams = gather_grams(other, discover(other), calibration, 2)
    ecodiff.prune(other, kept, grams, settings)
    expected = denoiser_of(other).state_dict()
    for name, value in denoiser_of(pipe).state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-4, msg=name)


def test_the_last_layer_answers_as_in_the_dense_model_to_what_it_reads_now():
    """By hand: its inputs in both models, on the dense model's own latents."""
    pipe, calibration = calibrated("flux")
    structures = discover(pipe)
    kept = random_mask(structures, {"heads", "neurons", "modulation"})
    module = "single_transformer_blocks.1.proj_out"
    steps = dense_steps(pipe, calibration.embeds, calibration.noise, calibration.call)
    linear = pipe.transformer.get_submodule(module)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    target = record(pipe, module, calibration)
    ecodiff.prune(pipe, kept, calibration, PruneSettings(ridge=RIDGE, groups=99))
    pruned, rows = pipe.transformer.get_submodule(module), []
    hook = pruned.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for step in steps:
            pipe.transformer(*step.args, **step.kwargs)
    hook.remove()
    heads = next(s for s in structures if s.name == "single_transformer_blocks.1.attn.heads")
    columns = torch.cat(
        [
            heads.columns(heads.consumers[0], kept[heads.name].nonzero().flatten()),
            heads.units * heads.width
            + kept["single_transformer_blocks.1.neurons"].nonzero().flatten(),
        ]
    )
    expected = least_squares_to(weight, bias, target, torch.cat(rows), columns, RIDGE)
    assert torch.allclose(pruned.weight.double(), expected[0], atol=1e-4)
    assert torch.allclose(pruned.bias.double(), expected[1], atol=1e-4)


def test_nothing_removed_changes_next_to_nothing():
    pipe, calibration = calibrated("sdxl")
    ecodiff.prune(pipe, {}, calibration, PruneSettings(groups=4))
    assert error(pipe, calibration) < 1e-9 * calibration.z0.var()


def test_neighbours_stay_together_in_parts_of_nearly_equal_size():
    assert _split("abcde", 2) == ["ab", "cde"]
    assert _split("abc", 9) == ["a", "b", "c"]
