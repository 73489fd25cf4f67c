"""toy-flux: a small `FluxPipeline` (as schnell, without guidance) for ShapeWorld; its training."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import nn
from torch.nn import functional as F

from ecodiff.toys import text
from ecodiff.toys.training import DEVICE, Latents, Recipe, fit

RECIPE = Recipe(cycles=(4100, 8000, 8000), batch=48, lr=1.5e-3, warmup=200)
HEADS, HEAD_DIM = 4, 24
# Dimensions of the rotary embedding per axis. Its frequencies are 10000^(-2i/d): with d below ten
# hardly any but the fastest one distinguishes the positions of an 8x8 grid.
ROTARY = (4, 10, 10)
# Timestep shift towards high noise, in training and sampling: large plain shapes stay visible under
# much noise, so the steps that decide the layout are the early ones.
SHIFT = 3.0
# From the second cycle on the model learns the prediction that classifier-free guidance of this
# scale would give (guidance distillation, as FLUX.1 dev), so it draws sharp shapes with one pass
# per step. It is its own teacher: "Diffusion Models without Classifier-free Guidance", Tang et al.
# 2025.
GUIDANCE = 2.0
UNCONDITIONAL = 0.1  # share of captions dropped from the second cycle on


def build(vae: AutoencoderKL, heads: int = HEADS, double: int = 3, single: int = 6) -> FluxPipeline:
    """The untrained pipeline: joint attention over 16 text tokens and 64 latent patches.

    Args:
        vae: the toys' autoencoder.
        heads: attention heads per block.
        double: joint blocks (image and text streams apart).
        single: single-stream blocks.
    """
    clip, t5 = text.clip_tokenizer(), text.t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * vae.config.latent_channels,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=heads,
        joint_attention_dim=text.WIDTH,
        pooled_projection_dim=text.WIDTH,
        guidance_embeds=False,
        axes_dims_rope=ROTARY,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=text.clip_encoder(clip),
        tokenizer=clip,
        text_encoder_2=text.t5_encoder(t5),
        tokenizer_2=t5,
        transformer=transformer,
    )


def train(
    vae: AutoencoderKL, recipe: Recipe = RECIPE, state: Path | None = None
) -> tuple[FluxPipeline, float]:
    """Train transformer and text encoders by flow matching.

    Args:
        vae: the trained toy-vae, which is not changed.
        recipe: steps, batch size, learning rate and seed.
        state: see `training.fit`.

    Returns:
        The pipeline on the CPU, and the seconds that training took.
    """
    torch.manual_seed(recipe.seed)
    pipe = build(vae).to(DEVICE)
    trained = nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2])
    data = Latents(pipe.vae, recipe)

    def velocity(noised: torch.Tensor, sigma: torch.Tensor, captions: list[str]) -> torch.Tensor:
        embeds, pooled, text_ids = pipe.encode_prompt(
            captions, prompt_2=None, max_sequence_length=text.MAX_TOKENS
        )
        side = math.isqrt(noised.shape[1])
        return pipe.transformer(
            hidden_states=noised,
            timestep=sigma,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=pipe._prepare_latent_image_ids(
                len(noised), side, side, noised.device, noised.dtype
            ),
        ).sample

    def loss_of_step(step: int) -> torch.Tensor:
        latents, captions = data.batch(step)
        clean = pipe._pack_latents(latents, *latents.shape)
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(torch.randn(len(clean), device=DEVICE))
        sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
        noised, target = torch.lerp(clean, noise, sigma[:, None, None]), noise - clean
        if step < recipe.cycles[0]:
            return F.mse_loss(velocity(noised, sigma, captions), target)
        keep = torch.rand(len(clean), device=DEVICE) >= UNCONDITIONAL
        captions = [caption if kept else "" for caption, kept in zip(captions, keep, strict=True)]
        predicted = velocity(noised, sigma, captions)
        with torch.no_grad():
            free = velocity(noised, sigma, [""] * len(clean))
        # The model's own prediction is already guided, hence this weight instead of GUIDANCE - 1:
        # with it, training converges to guidance of scale GUIDANCE.
        guided = (1 - 1 / GUIDANCE) * (predicted.detach() - free)
        return F.mse_loss(predicted, target + keep[:, None, None] * guided)

    seconds = fit(trained, recipe, loss_of_step, "toy-flux", state)
    return pipe.to("cpu"), seconds
