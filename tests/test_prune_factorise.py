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
    from ecodiff.calibrate.grams import gather_grams

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


def dense_adapter(pipe, folder):
    """Save a random adapter of all the linears that read the conditioning, and of another."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    denoiser = denoiser_of(pipe)
    linears = [s.directions_of for s in discover(pipe, "rank") if s.directions_of]
    torch.manual_seed(5)
    targets = [*linears, "transformer_blocks.0.attn.to_q"]
    ranks = {"norm_out.linear": 3}
    denoiser.add_adapter(
        LoraConfig(
            r=2,
            lora_alpha=3,
            target_modules=targets,
            rank_pattern=ranks,
            init_lora_weights=False,
        )
    )
    type(pipe).save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(denoiser),
        **_collate_lora_metadata({"transformer": denoiser}),
    )
    return pipe


def test_an_adapter_of_the_dense_model_adds_what_it_added_there(tmp_path):
    """The reference: peft's own layer on the dense linear."""
    adapted = dense_adapter(calibrated("flux")[0], tmp_path)
    pipe, calibration = calibrated("flux")
    mask = mask_of(pipe, calibration, some_directions)
    ecodiff.prune(pipe, mask)
    bare = z0(pipe, calibration)
    pipe.load_lora_weights(tmp_path)
    name, x = "norm_out.linear", torch.randn(2, 48)
    dense, low = (denoiser_of(p).get_submodule(name) for p in (adapted, pipe))
    added = dense(x) - dense.base_layer(x)
    torch.testing.assert_close(low(x) - low.up(low.down(x)), added)
    assert (z0(pipe, calibration) - bare).abs().max() > 1e-3
    keys = denoiser_of(pipe).state_dict().keys()
    assert f"{name}.free.lora_A.default_0.weight" in keys
    pipe.unload_lora_weights()
    assert torch.equal(z0(pipe, calibration), bare)
    assert not [key for key in denoiser_of(pipe).state_dict() if "free" in key]


def test_a_fitted_adapter_is_one_of_the_pruned_model(tmp_path):
    dense_adapter(calibrated("flux")[0], tmp_path)
    drawn = []
    for given in ("file", "fitted"):
        pipe, calibration = calibrated("flux")
        ecodiff.prune(pipe, mask_of(pipe, calibration, some_directions))
        lora = tmp_path if given == "file" else ecodiff.fit_lora(tmp_path, pipe)
        pipe.load_lora_weights(lora)
        drawn.append(z0(pipe, calibration))
    torch.testing.assert_close(*drawn)


def test_adapters_are_trained_beside_a_linear_of_a_low_rank():
    from peft import LoraConfig

    pipe, calibration = calibrated("flux")
    ecodiff.prune(pipe, mask_of(pipe, calibration, some_directions))
    denoiser = denoiser_of(pipe)
    denoiser.add_adapter(LoraConfig(r=2, target_modules=["norm1.linear"]))
    trained = {name for name, p in denoiser.named_parameters() if p.requires_grad}
    assert {name.rpartition(".lora_")[0] for name in trained} == {
        "transformer_blocks.0.norm1.linear.free"
    }


def test_other_adapters_than_lora_of_a_low_rank_linear_are_refused():
    pipe, calibration = calibrated("flux")
    ecodiff.prune(pipe, mask_of(pipe, calibration, some_directions))
    state = {"transformer_blocks.0.norm1.linear.lora_magnitude_vector": torch.zeros(288)}
    with pytest.raises(ValueError, match=r"norm1.linear is of a low rank here"):
        denoiser_of(pipe).fit_lora(state)
