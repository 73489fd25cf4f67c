"""Modulation by rank: pruned equals masked, in memory and from disk."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from test_prune_means import z0
from tiny import calibrated

import ecodiff
from ecodiff.mask import Mask
from ecodiff.models.pipelines import fingerprint
from ecodiff.models.structures import count_parameters, denoiser_of, discover
from ecodiff.prune.factorise import factorise
from ecodiff.runtime.errors import UserError

FAMILIES = ("flux", "sdxl", "sd3", "pixart", "wan")


def some_directions(structure, seed, share=0.3):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(structure.units, generator=generator) < share
    return kept & (kept.cumsum(0) <= structure.units - structure.together)


def mask_of(pipe, calibration, keep, kinds=("modulation",)):
    structures = discover(pipe, "rank")
    whole = {s.name: torch.ones(s.units, dtype=torch.bool) for s in structures}
    kept = {s.name: keep(s, i) for i, s in enumerate(structures) if s.kind in kinds}
    scores = {s.name: torch.zeros(s.units) for s in structures}
    print_ = fingerprint(pipe)
    moments = calibration.moments
    return Mask(scores, {**whole, **kept}, print_, means=calibration.means, moments=moments)


def masked_z0(pipe, calibration, mask):
    gates = mask.gates(pipe)
    gates.set(mask.kept)
    with gates.attached(denoiser_of(pipe)):
        return z0(pipe, calibration)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.3, 0.0], ids=["some directions", "none"])
def test_pruned_equals_masked_and_saves_what_it_says(family, share, tmp_path):
    pipe, calibration = calibrated(family)
    mask = mask_of(pipe, calibration, lambda s, i: some_directions(s, i, share))
    structures, total = discover(pipe, "rank"), count_parameters(denoiser_of(pipe))
    dense, masked = z0(pipe, calibration), masked_z0(pipe, calibration, mask)
    assert (masked - dense).abs().max() > 1e-3
    ecodiff.prune(pipe, mask)
    assert (z0(pipe, calibration) - masked).abs().max() <= 1e-4
    gone = sum(s.removed(int((~mask.kept[s.name]).sum())) for s in structures)
    assert count_parameters(denoiser_of(pipe)) == total - gone
    ecodiff.save(pipe, tmp_path / "model")
    assert torch.equal(z0(ecodiff.load(tmp_path / "model"), calibration), z0(pipe, calibration))


@pytest.mark.parametrize("data", ["grams", "groups"])
def test_it_goes_with_heads_neurons_and_least_squares(data):
    from ecodiff.calibrate import gather_grams

    pipe, calibration = calibrated("flux")
    mask = mask_of(pipe, calibration, some_directions, ("modulation", "heads", "neurons"))
    moved = (masked_z0(pipe, calibration, mask) - calibration.z0).norm()
    given = calibration
    if data == "grams":
        given = gather_grams(pipe, discover(pipe), calibration, 2)
    ecodiff.prune(pipe, mask, given)
    assert (z0(pipe, calibration) - calibration.z0).norm() < moved
    assert denoiser_of(pipe).config["pruned"]["ranks"]


def test_a_mask_keeps_its_directions_on_disk(tmp_path):
    pipe, calibration = calibrated("flux")
    mask = mask_of(pipe, calibration, some_directions)
    mask.save(tmp_path / "mask.safetensors")
    again = Mask.load(tmp_path / "mask.safetensors")
    assert torch.equal(masked_z0(pipe, calibration, again), masked_z0(pipe, calibration, mask))


def test_a_rank_that_does_not_pay_is_refused():
    pipe, calibration = calibrated("flux")
    mask = mask_of(pipe, calibration, lambda s, i: torch.arange(s.units) > 0)
    with pytest.raises(UserError, match=r"a rank of 47 does not pay; keep at most \d+ directions"):
        ecodiff.prune(pipe, mask)


def test_the_largest_rank_that_pays_saves_the_least():
    """Worked out by trying all: in * out - r (in + out) of AdaLN's linear of 48 to 288."""
    pipe, _ = calibrated("flux")
    structure = next(s for s in discover(pipe, "rank") if s.directions_of)
    paying = [r for r in range(48) if 48 * 288 - r * (48 + 288) > 0]
    assert structure.units - structure.together == max(paying)
    assert structure.sizes()[: structure.together].tolist()[:-1] == [0] * (structure.together - 1)
    assert structure.sizes().sum() == 48 * 288


@pytest.mark.parametrize(("rank", "least", "most"), [(16, 26.8, 27.3), (64, 26.0, 26.8)])
def test_what_a_rank_removes_of_flux(rank, least, most):
    with torch.device("meta"):
        denoiser = FluxTransformer2DModel(guidance_embeds=True)
    structures, total = discover(denoiser, "rank"), count_parameters(denoiser)
    kept = {s.name: torch.arange(rank) for s in structures if s.directions_of}
    factorise(denoiser, structures, kept, {})
    assert least < 100 * (1 - count_parameters(denoiser) / total) < most


def test_an_adapter_of_a_linear_that_is_of_a_low_rank_is_refused():
    pipe, calibration = calibrated("flux")
    ecodiff.prune(pipe, mask_of(pipe, calibration, some_directions))
    name = "transformer_blocks.0.norm1.linear"
    state = {
        f"{name}.lora_A.weight": torch.zeros(1, 48),
        f"{name}.lora_B.weight": torch.zeros(288, 1),
    }
    with pytest.raises(ValueError, match=rf"adapter: {name} is of rank \d+ here"):
        denoiser_of(pipe).fit_lora(state)
