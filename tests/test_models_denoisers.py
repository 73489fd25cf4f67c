"""Denoisers beside those of the supported pipelines: pruned equals masked, or they are refused."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from ecodiff.models.pruned import pruned_class
from ecodiff.models.structures import discover, modulation_linears
from ecodiff.models.units import Structure
from ecodiff.prune.narrow import narrow
from ecodiff.runtime.errors import UserError
from ecodiff.trajectory.gates import Gates


def heads(count: int, width: int) -> dict[str, int]:
    return {"num_attention_heads": count, "attention_head_dim": width}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


PLANE = {"in_channels": 4, "out_channels": 4, "patch_size": 2, "num_layers": 2}
STEP = {"timestep": torch.tensor([300])}
TEXT = {"encoder_hidden_states": draw(1, 5, 8)}
PICTURE = {"hidden_states": draw(1, 4, 8, 8)}
SIZES = {name: torch.tensor([[64.0, 64.0]]) for name in ("original_size", "target_size")}
SIZES |= {"crop_coords": torch.tensor([[0.0, 0.0]])}
TEXTS = {"text_embed_dim": 8, "time_embed_dim": 8}
FILM = {"sample_width": 8, "sample_height": 8, "sample_frames": 8, "max_text_seq_length": 5}
TWO_SIZES = {n: SIZES[n] for n in ("target_size", "crop_coords")}
FREQUENCIES = {"max_size": (4, 32, 32), "patch_size": (1, 2, 2), "text_embed_dim": 8}
CLASSES = {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 8, "sample_size": 8}
TOKENS = {"in_channels": 4, "num_layers": 1, "joint_attention_dim": 8, "axes_dims_rope": (2, 2, 4)}
PLACES = {"img_ids": draw(16, 3), "txt_ids": draw(5, 3)}

TWO_IDS = {"img_ids": draw(16, 4), "txt_ids": draw(5, 4)}
GROUPS = {
    "num_attention_heads": 6,
    "num_kv_heads": 2,
    "hidden_size": 48,
    "axes_dim_rope": (4, 2, 2),
}

# Class: config, call.
UNDERSTOOD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "AuraFlowTransformer2DModel": (
        {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 1}
        | {"num_single_dit_layers": 1, "joint_attention_dim": 8, "caption_projection_dim": 24}
        | {"pos_embed_max_size": 64}
        | heads(3, 8),
        PICTURE | TEXT | STEP,
    ),
    "CogVideoXTransformer3DModel": (
        PLANE | TEXTS | FILM | heads(4, 16),
        {"hidden_states": draw(1, 1, 4, 8, 8)} | TEXT | STEP,
    ),
    "CogView3PlusTransformer2DModel": (
        PLANE | TEXTS | heads(4, 4) | {"condition_dim": 4, "pos_embed_max_size": 8},
        PICTURE | TEXT | STEP | SIZES,
    ),
    "CogView4Transformer2DModel": (
        PLANE | TEXTS | heads(4, 4) | {"condition_dim": 4},
        PICTURE | TEXT | STEP | SIZES,
    ),
    "CosmosTransformer3DModel": (
        PLANE | FREQUENCIES | heads(3, 12) | {"in_channels": 4, "adaln_lora_dim": 5},
        {"hidden_states": draw(1, 4, 1, 8, 8), "padding_mask": torch.zeros(1, 1, 8, 8)}
        | TEXT
        | STEP,
    ),
    "DiTTransformer2DModel": (
        PLANE | CLASSES | heads(3, 4),
        PICTURE | STEP | {"class_labels": torch.tensor([3])},
    ),
    "Flux2Transformer2DModel": (
        {"in_channels": 4, "num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 8}
        | {"timestep_guidance_channels": 16, "axes_dims_rope": (2, 2, 2, 2)}
        | heads(3, 8),
        {"hidden_states": draw(1, 16, 4), "guidance": torch.ones(1)}
        | TEXT
        | {"timestep": torch.tensor([0.3])}
        | TWO_IDS,
    ),
    "Lumina2Transformer2DModel": (
        {"in_channels": 4, "num_layers": 1, "num_refiner_layers": 1, "cap_feat_dim": 8}
        | {"multiple_of": 4, "axes_lens": (16, 16, 16)}
        | GROUPS,
        PICTURE
        | TEXT
        | {"timestep": torch.tensor([0.3])}
        | {"encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool)},
    ),
    "GlmImageTransformer2DModel": (
        PLANE | TEXTS | heads(3, 8) | {"condition_dim": 8, "prior_vq_quantizer_codebook_size": 9},
        PICTURE
        | TEXT
        | STEP
        | TWO_SIZES
        | {"prior_token_id": torch.tensor([3]), "prior_token_drop": torch.tensor([False])},
    ),
    "OvisImageTransformer2DModel": (
        TOKENS | heads(3, 8) | {"out_channels": 4, "num_single_layers": 2},
        {"hidden_states": draw(1, 16, 4)} | TEXT | {"timestep": torch.tensor([0.3])} | PLACES,
    ),
}


def masked_and_pruned(name: str, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of the dense, the masked and the pruned model, `kept` units left in each structure;
    in every second one where it is negative, and none in the others."""
    config, call = UNDERSTOOD[name]
    torch.manual_seed(0)
    dense = getattr(diffusers, name)(**config).eval().requires_grad_(False)
    for parameter in dense.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    structures = discover(dense)
    stays = {s.name: some(s, kept, i) for i, s in enumerate(structures)}
    mask = {s.name: torch.zeros(s.units).index_fill(0, stays[s.name], 1) for s in structures}
    biases = {n: dense.get_submodule(n).bias for n in modulation_linears(structures)}
    gates = Gates(structures, means={n: b for n, b in biases.items() if b is not None})
    gates.set(mask)
    with gates.attached(dense):
        masked = output(dense, call)
    small = deepcopy(dense)
    record = narrow(small, structures, stays)
    loaded = pruned_class(type(dense)).from_config({**dense.config, "pruned": record}).eval()
    loaded.load_state_dict(small.state_dict())
    return output(dense, call), masked, output(loaded, call)


def some(structure: Structure, kept: int, place: int) -> Tensor:
    if kept < 0:
        kept = place % 2
    generator = torch.Generator().manual_seed(place)
    return torch.randperm(structure.units, generator=generator)[:kept].sort().values


def output(denoiser: nn.Module, call: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return denoiser(**call, return_dict=False)[0]


@pytest.mark.parametrize("kept", [2, 1, 0, -1])
@pytest.mark.parametrize("name", UNDERSTOOD)
def test_a_pruned_denoiser_that_was_read_back_equals_the_masked_one(name, kept):
    dense, masked, pruned = masked_and_pruned(name, kept)
    assert (masked - dense).abs().max() > 1e-3 * dense.abs().max()
    torch.testing.assert_close(pruned, masked, rtol=0, atol=2e-5 * float(masked.abs().max()))


def test_a_denoiser_that_is_understood_in_part_is_refused():
    config = {"in_channels": 4, "num_layers": 2, "joint_attention_dim": 8, "mlp_ratio": 2}
    config |= {"axes_dims_rope": [2, 2, 4]} | heads(2, 8)
    with pytest.raises(UserError, match=r"transformer_blocks\.0\.encoder_proj"):
        discover(diffusers.NucleusMoEImageTransformer2DModel(**config))


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_the_page_of_denoisers_tells_what_is_understood(name):
    page = (Path(__file__).parents[1] / "docs/denoisers.md").read_text()
    assert f"| {name} | understood |" in page
