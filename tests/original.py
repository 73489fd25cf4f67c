"""An SDXL pipeline as the single file that its authors' own code, and most model sites, write."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor

Rules = Iterable[tuple[str, str]]
RESNET = (
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
)
UNET = (
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
    (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"^mid_block\.resnets\.0\.", "middle_block.0."),
    (r"^mid_block\.attentions\.0\.", "middle_block.1."),
    (r"^mid_block\.resnets\.1\.", "middle_block.2."),
)
VAE = (
    (r"\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r".down.\1.block.\2."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)
OPEN_CLIP = (
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.fc1\.", ".c_fc."),
    (r"\.fc2\.", ".c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
)


def save_original(pipe: StableDiffusionXLPipeline, path: Path) -> None:
    """Write all weights of a pipeline with one layer a block to one safetensors file."""
    parts = {
        "model.diffusion_model.": _unet(pipe.unet.state_dict()),
        "first_stage_model.": _vae(pipe.vae.state_dict()),
        "conditioner.embedders.0.transformer.text_model.": pipe.text_encoder.state_dict(),
        "conditioner.embedders.1.model.": _open_clip(pipe.text_encoder_2.state_dict()),
    }
    weights = {
        prefix + name: tensor.contiguous().clone()
        for prefix, part in parts.items()
        for name, tensor in part.items()
    }
    save_file(weights, path)


def _renamed(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _unet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    layers = 1 + max(
        int(n) for n in re.findall(r"down_blocks\.\d+\.resnets\.(\d+)", " ".join(state))
    )
    each = layers + 1  # a downsampler is a block of its own, and up blocks have a layer more
    attends = {re.match(r"up_blocks\.\d+", n)[0] for n in state if "up_blocks" in n and "attn" in n}

    def place(match: re.Match) -> str:
        side, block, kind, index = match[1], int(match[2]), match[3], int(match[4])
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * each}.0.op."
        if kind == "upsamplers":
            last = 2 if f"up_blocks.{block}" in attends else 1
            return f"output_blocks.{block * each + layers}.{last}.conv."
        part = 0 if kind == "resnets" else 1
        if side == "down":
            return f"input_blocks.{1 + block * each + index}.{part}."
        return f"output_blocks.{block * each + index}.{part}."

    named = {}
    for name, tensor in state.items():
        if "resnets" in name:
            name = _renamed(name, RESNET)
        if name.startswith("mid_block.resnets"):
            name = _renamed(name, UNET)
        name = re.sub(
            r"^(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\."
            r"(?:conv\.(?=weight|bias))?",
            place,
            name,
        )
        named[_renamed(name, UNET)] = tensor
    return named


def _vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    blocks = 1 + max(int(n) for n in re.findall(r"up_blocks\.(\d+)\.", " ".join(state)))
    named = {}
    for name, tensor in state.items():
        name = re.sub(
            r"\.up_blocks\.(\d+)\.", lambda found: f".up.{blocks - 1 - int(found[1])}.", name
        )
        name = _renamed(name, ((r"\.up\.(\d+)\.resnets\.", r".up.\1.block."), *VAE))
        name = name.replace(".upsamplers.0.", ".upsample.")
        is_projection = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        named[name] = tensor[:, :, None, None] if is_projection else tensor
    return named


def _open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {}
    for name, tensor in state.items():
        if name == "text_projection.weight":
            named["text_projection"] = tensor.T
        elif found := re.match(r"(.*\.self_attn)\.q_proj\.(weight|bias)", name):
            parts = [state[f"{found[1]}.{part}_proj.{found[2]}"] for part in "qkv"]
            new = _renamed(f"{found[1]}.", OPEN_CLIP).replace(".self_attn.", ".attn.")
            named[f"{new}in_proj_{found[2]}"] = torch.cat(parts)
        elif not re.search(r"\.self_attn\.[kv]_proj\.", name):
            named[_renamed(name, OPEN_CLIP)] = tensor
    return named
