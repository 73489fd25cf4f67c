"""Pruning a pruned model again, the way past what one pruning can take."""

from __future__ import annotations

import pytest
import torch
from tiny import CALLS, tiny, whole_mask, z0

import ecodiff
from ecodiff.calibrate import calibrate
from ecodiff.calibrate.grams import gather_grams
from ecodiff.mask import make_mask
from ecodiff.models.pipelines import dense_fingerprint, fingerprint
from ecodiff.models.pruned import unpacked
from ecodiff.models.structures import count_parameters, denoiser_of, discover
from ecodiff.runtime.errors import UserError
from ecodiff.trajectory.gates import Gates

FAMILIES = ("sdxl", "flux", "sd3", "pixart", "sana", "z-image")


def by_turns(structures, first):
    """None, one, half or two thirds of the units, by turns."""
    kept = {}
    for i, s in enumerate(structures):
        units = torch.arange(s.units)
        kept[s.name] = [units < 0, units == s.units - 1, units % 2 == 0, units % 3 > 0][
            (i + first) % 4
        ]
    return kept


def twice(family):
    """A pipeline that was pruned twice, and the units that its second mask kept."""
    pipe = tiny(family)
    ecodiff.prune(pipe, by_turns(discover(pipe), 0))
    second = by_turns(discover(pipe), 2)
    ecodiff.prune(pipe, second)
    return pipe, second


def close(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_again_equals_masked(family, tmp_path):
    pipe = tiny(family)
    ecodiff.prune(pipe, by_turns(discover(pipe), 0))
    once, structures = z0(pipe, family), discover(pipe)
    kept, gates = by_turns(structures, 2), Gates(structures)
    gates.set(kept)
    with gates.attached(denoiser_of(pipe)):
        masked = z0(pipe, family)
    before = count_parameters(denoiser_of(pipe))
    promised = sum(s.removed(int((~kept[s.name]).sum())) for s in structures)
    ecodiff.prune(pipe, kept)
    close(z0(pipe, family), masked)
    assert (masked - once).abs().max() > 1e-4
    # An attention without heads takes its q and k norms with it.
    assert 0 <= before - promised - count_parameters(denoiser_of(pipe)) < 200
    ecodiff.save(pipe, tmp_path / "model")
    close(z0(ecodiff.load(tmp_path / "model"), family), masked)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_the_record_tells_which_units_of_the_dense_model_stayed(family):
    """Weights of what is left lie in the dense model where the record says."""
    dense, (pipe, _) = tiny(family), twice(family)
    dense, denoiser = denoiser_of(dense), denoiser_of(pipe)
    record = denoiser.config["pruned"]
    checked = 0
    for name, shape in record["shapes"].items():
        if name in record["scattered"]:
            layer = denoiser.get_submodule(name)
            rows = dense.get_submodule(name).weight[layer.index]
            assert torch.equal(layer.rows.weight, rows)
            continue
        weight, left = dense.get_submodule(name).weight, denoiser.get_submodule(name).weight
        sides = record["kept"][name]
        if "rows" in sides:
            weight = weight[unpacked(sides["rows"])]
        if "columns" in sides:
            weight = weight[:, unpacked(sides["columns"])]
        assert torch.equal(weight, left) and list(left.shape) == shape
        checked += left.numel() > 0
    assert checked > 4


def test_a_mask_of_a_pruned_model_is_made_kept_and_used(tmp_path):
    pipe = tiny("flux")
    dense = fingerprint(pipe)
    ecodiff.prune(pipe, by_turns(discover(pipe), 1))
    call = CALLS["flux"]
    calibration = calibrate(pipe, ["a red square", "a blue ring"], [1, 2], call, 2)
    settings = {"iterations": 2, "batch": 2, "modulation": "channels"}
    mask, _ = make_mask(pipe, "ecodiff", 0.3, calibration=calibration, settings=settings)
    mask.save(tmp_path / "mask.safetensors")
    mask = ecodiff.Mask.load(tmp_path / "mask.safetensors")
    with pytest.raises(UserError, match="another model"):
        ecodiff.prune(tiny("flux"), mask)
    grams = gather_grams(pipe, discover(pipe), calibration, 2)
    before = count_parameters(pipe.transformer)
    ecodiff.prune(pipe, mask, grams)
    assert count_parameters(pipe.transformer) <= 0.7 * before
    assert dense_fingerprint(pipe) == dense


def test_directions_go_in_a_second_pruning():
    pipe = tiny("flux")
    heads = {s.name: torch.arange(s.units) == 0 for s in discover(pipe) if s.kind == "heads"}
    ecodiff.prune(pipe, heads)
    call = CALLS["flux"]
    calibration = calibrate(pipe, ["a red square", "a blue ring"], [1, 2], call, 2)
    mask, _ = make_mask(pipe, "sensitivity", 0.4, calibration=calibration)
    gates = mask.gates(pipe)
    gates.set(mask.kept)
    with gates.attached(pipe.transformer):
        masked = z0(pipe, "flux")
    ecodiff.prune(pipe, mask)
    close(z0(pipe, "flux"), masked)
    record = pipe.transformer.config["pruned"]
    assert record["ranks"] and record["heads"].keys() == {n.removesuffix(".heads") for n in heads}
    again = {s.name: torch.arange(s.units) % 2 == 0 for s in discover(pipe)}
    ecodiff.prune(pipe, again)
    assert pipe.transformer.config["pruned"]["ranks"] == record["ranks"]


def test_the_mask_of_the_dense_model_does_not_fit_again():
    pipe = tiny("sdxl")
    mask = whole_mask(pipe, by_turns(discover(pipe), 1))
    ecodiff.prune(pipe, mask)
    before = z0(pipe, "sdxl")
    with pytest.raises(UserError, match="another model"):
        ecodiff.prune(pipe, mask)
    with pytest.raises(UserError, match=r"must be bool of|is not a structure of this model"):
        ecodiff.prune(pipe, mask.kept)
    assert torch.equal(z0(pipe, "sdxl"), before)
