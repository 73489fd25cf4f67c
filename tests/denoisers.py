"""Denoisers with random weights, tiny or on the meta device, and calls that fit them."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
TINY_SDXL = SDXL | {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (2, 4),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 8,
}
TINY_FLUX = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 8,
    "axes_dims_rope": (2, 2, 4),
}


def tiny_unet(seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(**TINY_SDXL).eval().requires_grad_(False)


def tiny_transformer(seed: int = 0) -> FluxTransformer2DModel:
    torch.manual_seed(seed)
    return FluxTransformer2DModel(**TINY_FLUX).eval().requires_grad_(False)


def call(denoiser: nn.Module, prompts: int = 2, branches: int = 1, seed: int = 1) -> Tensor:
    """Run a tiny denoiser once on random inputs, the same in each guidance branch."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(denoiser.parameters()).dtype

    def draw(*shape: int) -> Tensor:
        x = torch.randn(prompts, *shape, generator=generator).to(dtype)
        return x.repeat(branches, *[1] * len(shape))

    if isinstance(denoiser, UNet2DConditionModel):
        conditions = {"text_embeds": draw(8), "time_ids": draw(6)}
        sample, text = draw(4, 8, 8), draw(5, 12)
        return denoiser(sample, 300, text, added_cond_kwargs=conditions).sample
    image, text, pooled = draw(16, 4), draw(5, 12), draw(8)
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return denoiser(
        image,
        text,
        pooled,
        torch.full((prompts * branches,), 0.3, dtype=dtype),
        img_ids=grid,
        txt_ids=torch.zeros(5, 3),
    ).sample
