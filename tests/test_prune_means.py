"""Gates that close onto means, and biases that give them once units are gone: the same algebra."""

import pytest
import torch
from test_prune_cut import KINDS, no_unit, one_unit, random_units
from tiny import CALLS, calibrated, tiny, whole_mask

import ecodiff
from ecodiff.calibrate import calibrate
from ecodiff.calibrate.grams import gather_grams
from ecodiff.config.sections import MaskSettings
from ecodiff.mask import Mask, make_mask
from ecodiff.models.pipelines import denoise
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.trajectory.gates import Gates


def z0(pipe, calibration):
    return denoise(pipe, calibration.embeds, calibration.noise, calibration.call)


def masked_z0(pipe, calibration, kept):
    gates = Gates(discover(pipe), means=calibration.means)
    gates.set(kept)
    with gates.attached(denoiser_of(pipe)):
        return z0(pipe, calibration)


@pytest.mark.parametrize(("family", "kind"), KINDS)
@pytest.mark.parametrize("keep", [random_units, one_unit, no_unit], ids=lambda f: f.__name__)
def test_pruned_equals_masked(family, kind, keep):
    pipe, calibration = calibrated(family)
    kept = {s.name: keep(s, i) for i, s in enumerate(discover(pipe)) if s.kind == kind}
    masked = masked_z0(pipe, calibration, kept)
    ecodiff.prune(pipe, whole_mask(pipe, kept, calibration.means))
    assert (z0(pipe, calibration) - masked).abs().max() <= 1e-4
    zeroed, _ = calibrated(family)
    ecodiff.prune(zeroed, kept)
    assert (z0(zeroed, calibration) - masked).abs().max() > 1e-3  # the means matter


def test_a_mean_is_that_of_all_that_a_linear_reads_or_a_modulation_writes():
    pipe, calibration = calibrated("flux")
    modulation, consumer = "norm_out.linear", "single_transformer_blocks.0.proj_out"
    seen = {modulation: [], consumer: []}
    denoiser = denoiser_of(pipe)
    hooks = [
        denoiser.get_submodule(modulation).register_forward_hook(
            lambda _, args, output: seen[modulation].append(output)
        ),
        denoiser.get_submodule(consumer).register_forward_pre_hook(
            lambda _, args: seen[consumer].append(args[0].flatten(0, -2))
        ),
    ]
    z0(pipe, calibration)
    for hook in hooks:
        hook.remove()
    for name, rows in seen.items():
        expected = torch.cat(rows).double().mean(0).float()
        torch.testing.assert_close(calibration.means[name], expected, rtol=1e-4, atol=1e-6)


def test_there_is_no_mean_where_no_bias_could_give_it():
    pipe = tiny("flux")
    linear = pipe.transformer.transformer_blocks[0].ff.net[2]
    linear.bias = None
    calibration = calibrate(pipe, ["a", "b"], [0, 1], CALLS["flux"], 2)
    assert "transformer_blocks.0.ff.net.2" not in calibration.means
    assert "transformer_blocks.0.ff_context.net.2" in calibration.means


def test_a_closed_gate_lets_the_mean_through_and_an_open_one_the_value():
    pipe, calibration = calibrated("flux")
    name = "transformer_blocks.0.ff.neurons"
    gates = Gates(discover(pipe), means=calibration.means)
    units = next(s.units for s in gates.structures if s.name == name)
    gates.set({name: torch.linspace(0, 1, units)})
    module = "transformer_blocks.0.ff.net.2"
    x = torch.randn(1, 3, units)
    mean, gate = calibration.means[module], torch.linspace(0, 1, units)
    torch.testing.assert_close(gates._gated(module, x), mean + gate * (x - mean))
    assert torch.equal(gates._gated(module, x)[..., 0], mean[0].expand(1, 3))
    assert torch.equal(gates._gated(module, x)[..., -1], x[..., -1])


def test_means_outlive_the_files(tmp_path):
    pipe, calibration = calibrated("flux")
    grams = gather_grams(pipe, discover(pipe), calibration, 2)
    mask = Mask({}, {}, "model::", {}, calibration.means)
    (tmp_path / "folder").mkdir()
    for one, read in ((calibration, "file"), (grams, "folder"), (mask, "file")):
        one.save(tmp_path / ("folder/0.safetensors" if one is grams else "file"))
        found = type(one).load(tmp_path / read).means
        assert found.keys() == calibration.means.keys() != set()
        assert all(torch.equal(found[name], mean) for name, mean in calibration.means.items())


@pytest.mark.parametrize(
    ("method", "closed", "has_means"),
    [
        ("sensitivity", "mean", True),
        ("sensitivity", "zero", False),
        ("flat-start", "mean", False),  # as published
        ("magnitude", "mean", False),
    ],
)
def test_masks_hold_means_where_gates_closed_onto_them(method, closed, has_means):
    pipe, calibration = calibrated("flux")
    settings = MaskSettings(batch=2, iterations=1, closed=closed)
    mask, _ = make_mask(pipe, method, 0.1, calibration=calibration, settings=settings)
    assert bool(mask.means) == bool(mask.at(pipe, 0.2).means) == has_means


def test_compensation_lets_modulation_give_its_mean_whatever_the_mask():
    pipe, calibration = calibrated("flux")
    grams = gather_grams(pipe, discover(pipe), calibration, 2)
    kept = {s.name: random_units(s, 0) for s in discover(pipe) if s.kind == "modulation"}
    masked = masked_z0(pipe, calibration, kept)
    ecodiff.prune(pipe, kept, grams)
    assert (z0(pipe, calibration) - masked).abs().max() <= 1e-4
