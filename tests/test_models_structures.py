"""Structures against library modules of other sizes, real slicing, and the real models' sizes."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import torch
from denoisers import SDXL, tiny_transformer, tiny_unet
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import AdaLayerNormZero
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from tiny import tiny
from torch import nn

from ecodiff.models.structures import count_parameters, denoiser_of, discover, maskable_share
from ecodiff.models.units import Port, Structure
from ecodiff.runtime.errors import UserError


def in_block(**modules: nn.Module) -> nn.Module:
    return nn.ModuleDict({"block": nn.ModuleDict(modules)})


def only(model: nn.Module) -> Structure:
    (structure,) = discover(model)
    return structure


def by_kind(structures: list[Structure], kind: str) -> list[Structure]:
    return [s for s in structures if s.kind == kind]


def test_sdxl_sizes_and_shares():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
    structures, total = discover(unet), count_parameters(unet)
    heads, neurons = by_kind(structures, "heads"), by_kind(structures, "neurons")
    assert total == 2_567_463_684
    assert (len(heads), sum(s.units for s in heads)) == (140, 2_600)
    assert (len(neurons), sum(s.units for s in neurons)) == (70, 332_800)
    assert len(structures) == 210
    assert maskable_share(heads, total) == pytest.approx(0.372, abs=5e-4)
    assert maskable_share(neurons, total) == pytest.approx(0.479, abs=5e-4)


def test_flux_sizes_and_shares():
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    structures, total = discover(transformer), count_parameters(transformer)
    heads, neurons = by_kind(structures, "heads"), by_kind(structures, "neurons")
    modulation = by_kind(structures, "modulation")
    assert total == pytest.approx(11.9e9, rel=1e-3)
    assert (len(heads), sum(s.units for s in heads)) == (57, 57 * 24)
    assert (len(neurons), sum(s.units for s in neurons)) == (76, 76 * 4 * 3072)
    assert len(modulation) == 2 * 19 + 38 + 1
    # The heads' columns of the 38 packed proj_out, 3 % of the model, go with the heads.
    packed = 38 * 3072 * 3072 / total
    assert maskable_share(heads, total) - packed == pytest.approx(0.21, abs=5e-3)
    assert maskable_share(neurons, total) + packed == pytest.approx(0.51, abs=5e-3)
    assert maskable_share(modulation, total) == pytest.approx(0.27, abs=5e-3)


@pytest.mark.parametrize("activation", ["geglu", "gelu", "gelu-approximate", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_neuron_parameters_are_those_of_a_feed_forward_one_narrower(activation, bias):
    def build(inner):
        return FeedForward(6, 5, inner_dim=inner, activation_fn=activation, bias=bias)

    neurons = only(nn.ModuleDict({"ff": build(9)}))
    assert (neurons.name, neurons.kind, neurons.units) == ("ff.neurons", "neurons", 9)
    difference = count_parameters(build(9)) - count_parameters(build(8))
    assert neurons.unit_parameters == difference


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"bias": True, "cross_attention_dim": 7},
        {"out_bias": False, "qk_norm": "rms_norm"},
        {"added_kv_proj_dim": 6, "context_pre_only": False},
        {"added_kv_proj_dim": 6, "context_pre_only": False, "added_proj_bias": False},
    ],
)
def test_head_parameters_are_those_of_an_attention_one_narrower(extra):
    def build(heads):
        return Attention(query_dim=6, heads=heads, dim_head=4, **extra)

    heads = only(in_block(attn=build(3)))
    assert (heads.name, heads.units, heads.width) == ("block.attn.heads", 3, 4)
    assert heads.unit_parameters == count_parameters(build(3)) - count_parameters(build(2))


def test_query_heads_go_with_the_key_that_they_share():
    heads = only(in_block(attn=Attention(6, heads=6, kv_heads=2, dim_head=4)))
    assert (heads.units, [port.width for port in heads.producers]) == (2, [12, 4, 4])
    assert heads.consumers == (Port("block.attn.to_out.0", (0,), 12),)


def test_one_linear_may_give_queries_keys_and_values_as_blocks_of_rows():
    attention = nn.Module()
    attention.heads, attention.to_qkv = 3, nn.Linear(5, 18)
    attention.to_out = nn.Linear(6, 5)
    heads = only(in_block(attn=attention))
    assert heads.producers == (Port("block.attn.to_qkv", (0, 6, 12), 2),)
    assert heads.unit_parameters == 6 * (5 + 1) + 2 * 5


def test_joint_attention_shares_its_heads_between_both_streams():
    attention = Attention(6, heads=2, dim_head=4, added_kv_proj_dim=6, context_pre_only=False)
    heads = only(in_block(attn=attention))
    names = [p.module.removeprefix("block.attn.") for p in (*heads.producers, *heads.consumers)]
    assert names == [
        *("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "add_q_proj"),
        *("to_out.0", "to_add_out"),
    ]


def test_modulation_loses_rows_of_its_weight_only():
    modulation = only(nn.ModuleDict({"norm1": AdaLayerNormZero(4)}))
    assert (modulation.name, modulation.units) == ("norm1.modulation", 24)
    assert modulation.producers == (Port("norm1.linear"),)
    assert modulation.consumers == ()
    assert modulation.unit_parameters == 4  # the bias stays


def test_parallel_block_packs_heads_before_neurons():
    block = FluxSingleTransformerBlock(dim=12, num_attention_heads=3, attention_head_dim=4)
    neurons, _, heads = discover(nn.ModuleDict({"block": block}))
    assert heads.consumers == (Port("block.proj_out", (0,), 4),)
    assert neurons.consumers == (Port("block.proj_out", (12,)),)
    assert heads.unit_parameters == 4 * (3 * (12 + 1) + 12)
    assert neurons.unit_parameters == (12 + 1) + 12


@pytest.mark.parametrize("build", [tiny_unet, tiny_transformer])
def test_unit_parameters_equal_those_counted_by_slicing(build):
    denoiser = build()
    before = count_parameters(denoiser)
    for structure in discover(denoiser):
        kept = torch.arange(1, structure.units - 1)  # the first and the last unit go
        after = before
        for port in structure.producers:
            linear, gone = denoiser.get_submodule(port.module), _gone(structure, port, kept)
            left = torch.ones(linear.out_features, dtype=torch.bool).index_fill(0, gone, False)
            after -= linear.weight.numel() - linear.weight[left].numel()
            if linear.bias is not None and structure.kind != "modulation":
                after -= linear.bias.numel() - linear.bias[left].numel()
        for port in structure.consumers:
            linear, gone = denoiser.get_submodule(port.module), _gone(structure, port, kept)
            left = torch.ones(linear.in_features, dtype=torch.bool).index_fill(0, gone, False)
            after -= linear.weight.numel() - linear.weight[:, left].numel()
        assert before - after == 2 * structure.unit_parameters, structure.name


def _gone(structure: Structure, port: Port, kept: torch.Tensor) -> torch.Tensor:
    units = torch.arange(structure.units)
    return structure.columns(port, units[~torch.isin(units, kept)])


def test_columns_keep_the_order_of_packed_halves():
    port = Port("net.0.proj", (0, 10))
    structure = Structure("ff.neurons", "neurons", 10, (port,), (), 1)
    assert structure.columns(port, torch.tensor([3, 1])).tolist() == [3, 1, 13, 11]


def test_columns_span_the_head_dimension_behind_the_offset():
    port = Port("proj_out", (100,), 3)
    structure = Structure("attn.heads", "heads", 4, (), (port,), 1)
    assert structure.columns(port, torch.tensor([0, 2])).tolist() == [100, 101, 102, 106, 107, 108]


@pytest.mark.parametrize("build", [tiny_unet, tiny_transformer])
def test_order_is_that_of_named_modules_and_names_are_unique(build):
    denoiser = build()
    owners = [s.name.rpartition(".")[0] for s in discover(denoiser)]
    order = [name for name, _ in denoiser.named_modules()]
    assert len(set(owners)) == len(owners)
    assert owners == sorted(owners, key=order.index)


def test_discover_takes_a_pipeline_or_its_denoiser():
    unet, transformer = tiny_unet(), tiny_transformer()
    assert discover(SimpleNamespace(unet=unet)) == discover(unet)
    assert discover(SimpleNamespace(transformer=transformer)) == discover(transformer)
    with pytest.raises(UserError, match="no denoiser"):
        discover(SimpleNamespace(vae=unet))


def test_classes_do_not_matter_only_linears_do():
    attention = nn.Module()
    attention.heads = 2
    for name in ("to_q", "to_k", "to_v"):
        attention.add_module(name, nn.Linear(5, 6))
    attention.to_out = nn.ModuleList([nn.Linear(6, 5)])
    assert only(in_block(attn=attention)).unit_parameters == 3 * (3 * 6 + 5)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.zeros(4, 6, 12))


def fused() -> nn.Module:
    attention = Attention(6, heads=2, dim_head=4)
    attention.to_qkv = nn.Linear(6, 24)
    return in_block(attn=attention)


def adapted() -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    attention = Attention(6, heads=2, dim_head=4)
    return inject_adapter_in_model(LoraConfig(target_modules=["to_q"]), in_block(attn=attention))


UNFIT = {
    "norm over all heads": (
        lambda: in_block(
            attn=Attention(6, heads=2, kv_heads=2, dim_head=4, qk_norm="rms_norm_across_heads")
        ),
        "block.attn.to_q",
    ),
    "keys of no whole group": (
        lambda: in_block(attn=Attention(6, heads=4, kv_heads=3, dim_head=4)),
        "block.attn.to_k",
    ),
    "a linear whose name has the letters emb": (
        lambda: in_block(attn=Attention(6, heads=2, dim_head=4), member_proj=nn.Linear(6, 6)),
        "block.member_proj",
    ),
    "experts in one tensor": (
        lambda: in_block(attn=Attention(6, heads=2, dim_head=4), experts=Experts()),
        "block.experts",
    ),
    "unknown linear": (
        lambda: in_block(attn=Attention(6, heads=2, dim_head=4), router=nn.Linear(6, 2)),
        "block.router",
    ),
    "convolution": (
        lambda: in_block(attn=Attention(6, heads=2, dim_head=4), ff=nn.Conv2d(6, 6, 3)),
        "block.ff",
    ),
    "fused projections": (fused, "block.attn.to_qkv"),
    "adapter": (adapted, "block.attn.to_q"),
    "nothing": (lambda: nn.Sequential(nn.Linear(3, 3)), "understood: 0"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_is_not_fully_understood_is_refused_by_name(case):
    build, named = UNFIT[case]
    with pytest.raises(UserError, match=named):
        discover(build())


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_what_is_found_agrees_with_the_plan_that_the_model_publishes(family):
    """Tensor parallelism splits the rows of what we call producers, the columns of consumers."""
    denoiser = denoiser_of(tiny(family))
    structures = [s for s in discover(denoiser) if s.consumers]
    ours = {
        "colwise": {port.module for s in structures for port in s.producers},
        "rowwise": {port.module for s in structures for port in s.consumers},
    }
    linears = [n for n, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    for pattern, split in denoiser._tp_plan.items():
        side = "colwise" if split == "colwise" else "rowwise"  # packed projections have a class
        matching = {name for name in linears if fnmatch(name, pattern)}
        assert matching <= ours[side], pattern
        ours[side] -= matching
    assert ours == {"colwise": set(), "rowwise": set()}


class Packed(nn.Linear):
    """Two values a byte in one column, as four-bit quantisers keep them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


class Wrapped(nn.Linear):
    """A weight of the right shape, in a type of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight = WrappedParameter(linear.weight.detach())


class WrappedParameter(nn.Parameter):
    pass


@pytest.mark.parametrize("kind", [Packed, Wrapped])
@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_a_quantised_denoiser_is_refused_by_the_names_of_its_layers(family, every, kind):
    denoiser = denoiser_of(tiny(family))
    linears = [
        n for n, module in denoiser.named_modules() if isinstance(module, nn.Linear) and "attn" in n
    ]
    for name in linears if every else linears[:1]:
        denoiser.set_submodule(name, kind(denoiser.get_submodule(name)))
    with pytest.raises(UserError, match=rf"is quantised \({re.escape(linears[0])}\.weight: "):
        discover(denoiser)
