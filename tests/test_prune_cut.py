"""Pruned equals masked, for every kind of structure of both families."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tiny import CALLS, calibrated, tiny, whole_mask
from torch import nn

import ecodiff
from ecodiff.calibrate.grams import gather_grams
from ecodiff.models.pipelines import denoise, encode, starting_noise
from ecodiff.models.pruned import NoHeads, Pruned, ScatterLinear
from ecodiff.models.structures import count_parameters, denoiser_of, discover
from ecodiff.runtime.errors import UserError
from ecodiff.trajectory.gates import Gates

FAMILIES = ("sdxl", "flux")
KINDS = (("sdxl", "heads"), ("sdxl", "neurons"), *(("flux", k) for k in ("heads", "neurons")))
KINDS += (("flux", "modulation"),)


@cache
def inputs(family):
    """Embeddings and starting noise; the same for all copies of the tiny pipeline."""
    pipe = tiny(family)
    embeds = encode(pipe, ["a red square", "a blue ring on navy"], CALLS[family])
    return embeds, starting_noise(pipe, [1, 2], CALLS[family])


def z0(pipe, family):
    return denoise(pipe, *inputs(family), CALLS[family])


def masked_z0(pipe, family, kept):
    gates = Gates(discover(pipe))
    gates.set(kept)
    with gates.attached(denoiser_of(pipe)):
        return z0(pipe, family)


def random_units(structure, seed, share=0.5):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(structure.units, generator=generator) < share


def one_unit(structure, seed):
    return torch.arange(structure.units) == seed % structure.units


def no_unit(structure, seed):
    return torch.zeros(structure.units, dtype=torch.bool)


def half_of_the_structures_empty(structure, seed):
    return no_unit(structure, seed) if seed % 2 else random_units(structure, seed)


@pytest.mark.parametrize(("family", "kind"), KINDS)
@pytest.mark.parametrize(
    "keep",
    [random_units, one_unit, no_unit, half_of_the_structures_empty],
    ids=lambda f: f.__name__,
)
def test_pruned_equals_masked(family, kind, keep):
    pipe = tiny(family)
    kept = {s.name: keep(s, i) for i, s in enumerate(discover(pipe)) if s.kind == kind}
    masked = masked_z0(pipe, family, kept)
    assert (masked - z0(pipe, family)).abs().max() > 1e-3  # the mask matters
    ecodiff.prune(pipe, kept)
    assert (z0(pipe, family) - masked).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.0.attn.heads",
        "transformer_blocks.0.ff.neurons",
        "transformer_blocks.0.ff_context.neurons",
        "transformer_blocks.0.norm1_context.modulation",
        "single_transformer_blocks.0.attn.heads",
        "single_transformer_blocks.0.neurons",
        "single_transformer_blocks.1.norm.modulation",
        "norm_out.modulation",
    ],
)
def test_one_structure_without_units_among_whole_ones(name):
    pipe = tiny("flux")
    kept = {s.name: no_unit(s, 0) for s in discover(pipe) if s.name == name}
    masked = masked_z0(pipe, "flux", kept)
    ecodiff.prune(pipe, kept)
    assert (z0(pipe, "flux") - masked).abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [random_units, no_unit], ids=lambda f: f.__name__)
def test_pruned_equals_masked_with_all_kinds_at_once(family, keep):
    pipe = tiny(family)
    kept = {s.name: keep(s, i) for i, s in enumerate(discover(pipe))}
    masked = masked_z0(pipe, family, kept)
    ecodiff.prune(pipe, kept)
    assert (z0(pipe, family) - masked).abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_fall_by_what_the_structures_promise(family):
    pipe = tiny(family)
    structures, before = discover(pipe), count_parameters(denoiser_of(pipe))
    kept = {s.name: random_units(s, i) | one_unit(s, i) for i, s in enumerate(structures)}
    promised = sum(int((~kept[s.name]).sum()) * s.unit_parameters for s in structures)
    ecodiff.prune(pipe, kept)
    assert before - count_parameters(denoiser_of(pipe)) == promised


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_changes_nothing(family):
    pipe = tiny(family)
    before = z0(pipe, family)
    ecodiff.prune(pipe, {s.name: torch.ones(s.units, dtype=torch.bool) for s in discover(pipe)})
    assert torch.equal(z0(pipe, family), before)


def test_attention_without_heads_returns_its_bias_and_not_its_input():
    pipe = tiny("sdxl")
    heads = next(s for s in discover(pipe) if s.kind == "heads")
    ecodiff.prune(pipe, {heads.name: no_unit(heads, 0)})
    attention = pipe.unet.get_submodule(heads.name.removesuffix(".heads"))
    width = attention.to_out[0].out_features
    output = attention(torch.randn(2, 5, width))
    assert torch.equal(output, attention.to_out[0].bias.expand(2, 5, width))


def test_joint_attention_without_heads_returns_both_biases():
    pipe = tiny("flux")
    heads = next(s for s in discover(pipe) if s.name == "transformer_blocks.0.attn.heads")
    ecodiff.prune(pipe, {heads.name: no_unit(heads, 0)})
    attention = pipe.transformer.transformer_blocks[0].attn
    width = attention.to_out[0].out_features
    image, text = attention(
        torch.randn(1, 3, width), encoder_hidden_states=torch.randn(1, 4, width)
    )
    assert torch.equal(image, attention.to_out[0].bias.expand(1, 3, width))
    assert torch.equal(text, attention.to_add_out.bias.expand(1, 4, width))


def test_single_block_without_heads_gives_zero_width():
    pipe = tiny("flux")
    name = "single_transformer_blocks.0.attn"
    heads = next(s for s in discover(pipe) if s.name == f"{name}.heads")
    ecodiff.prune(pipe, {heads.name: no_unit(heads, 0)})
    assert pipe.transformer.get_submodule(name)(torch.randn(2, 7, 32)).shape == (2, 7, 0)


def test_a_spatial_residual_attention_without_heads_keeps_shape_residual_and_scale():
    attention = nn.Module()
    attention.to_out = nn.ModuleList([nn.Linear(0, 6), nn.Dropout(0.0)])
    attention.residual_connection, attention.rescale_output_factor = True, 2.0
    picture = torch.randn(2, 6, 3, 4)
    expected = (picture + attention.to_out[0].bias[:, None, None]) / 2
    assert torch.allclose(NoHeads(attention)(picture), expected)


@pytest.mark.parametrize("has_bias", [True, False])
def test_pruned_modulation_channels_are_exactly_their_bias_in_every_dtype(has_bias):
    linear = nn.Linear(3, 5, bias=has_bias).to(torch.bfloat16)
    output = ScatterLinear(linear, torch.tensor([1, 4]))(torch.randn(2, 3, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16 and output.shape == (2, 5)
    alone = linear.bias.detach() if has_bias else torch.zeros(5, dtype=torch.bfloat16)
    assert (output != alone).any(0).tolist() == [False, True, False, False, True]


def test_activations_stay_as_the_model_has_them():
    pipe = tiny("flux")
    kept = {s.name: random_units(s, 0) for s in discover(pipe) if s.kind == "neurons"}
    ecodiff.prune(pipe, kept)
    assert pipe.transformer.transformer_blocks[0].ff.net[0].approximate == "tanh"
    assert pipe.transformer.single_transformer_blocks[0].act_mlp.approximate == "tanh"


def test_attention_knows_its_heads_and_keeps_its_query_dim():
    pipe = tiny("sdxl")
    cross = [s for s in discover(pipe) if s.kind == "heads" and ".attn2." in s.name]
    before = {s.name: pipe.unet.get_submodule(s.name.removesuffix(".heads")) for s in cross}
    query_dims = {name: a.query_dim for name, a in before.items()}
    ecodiff.prune(pipe, {s.name: one_unit(s, 0) for s in cross})
    for s in cross:
        attention = pipe.unet.get_submodule(s.name.removesuffix(".heads"))
        assert attention.heads == 1 and attention.inner_dim == s.width
        assert attention.query_dim == attention.to_q.in_features == query_dims[s.name]


@pytest.mark.parametrize("groups", [1, 2])
def test_what_compensates_must_be_of_the_model(groups):
    pipe, (other, calibration) = tiny("flux"), calibrated("flux", seed=1)
    data = gather_grams(other, discover(other), calibration, 2) if groups == 1 else calibration
    with pytest.raises(UserError, match="another model"):
        ecodiff.prune(pipe, {s.name: one_unit(s, 0) for s in discover(pipe)}, data)
    assert not isinstance(denoiser_of(pipe), Pruned)


def test_prune_takes_a_mask_by_its_kept_units():
    pipe = tiny("sdxl")
    structure = next(s for s in discover(pipe) if s.kind == "neurons")
    (consumer,) = structure.consumers
    rows = pipe.unet.get_submodule(consumer.module).out_features
    ecodiff.prune(pipe, whole_mask(pipe, {structure.name: one_unit(structure, 3)}))
    assert pipe.unet.config["pruned"]["shapes"][consumer.module] == [rows, 1]
    assert pipe.unet.get_submodule(consumer.module).weight.shape == (rows, 1)


def test_the_verb_survives_imports_of_its_package():
    import ecodiff.prune.cut

    assert callable(ecodiff.prune)
    assert ecodiff.prune.cut.prune is ecodiff.prune.prune


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"nowhere.heads": torch.ones(2, dtype=torch.bool)}, "nowhere.heads is not a structure"),
        (
            {"norm_out.modulation": torch.ones(3, dtype=torch.bool)},
            "is torch.bool \\(3,\\), must be bool of",
        ),
        ({"norm_out.modulation": torch.ones(3)}, "torch.float32"),
    ],
)
def test_a_mask_of_another_model_is_refused(mask, message):
    pipe = tiny("flux")
    before = type(pipe.transformer)
    with pytest.raises(UserError, match=message):
        ecodiff.prune(pipe, mask)
    assert type(pipe.transformer) is before
