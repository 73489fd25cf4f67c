"""The autoencoder that both toys share: 64x64 pictures to 16x16 latents of 4 channels."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from ecodiff.toys.training import DEVICE, Recipe, fit, scenes

RECIPE = Recipe(cycles=(2400,), batch=8, lr=1.5e-3)
OBJECT_WEIGHT = 8.0  # objects cover a tenth of a picture and carry nearly all of its caption
NOISE = 0.1  # on latents that are decoded, so that a denoiser's small errors are forgiven
FREE_WEIGHT = 0.05  # keeps the channel that is no colour as narrow as the others


def build() -> AutoencoderKL:
    """The untrained autoencoder."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        force_upcast=False,
        shift_factor=0.0,
    )


def train(recipe: Recipe = RECIPE, state: Path | None = None) -> tuple[AutoencoderKL, float]:
    """The trained autoencoder, its scaling factor set to give unit latents, and the seconds.

    Three channels are drawn to the picture's own thumbnail: a small denoiser learns smooth latents
    in far fewer steps than those that an autoencoder makes when it is left free.
    """
    torch.manual_seed(recipe.seed)
    vae = build().to(DEVICE)

    def loss_of_step(step: int) -> torch.Tensor:
        pixels = scenes(recipe, step)[0].to(DEVICE)
        latents = vae.encode(pixels).latent_dist.mode()
        thumbnail = F.avg_pool2d(pixels, pixels.shape[-1] // latents.shape[-1])
        colours, free = latents[:, :3], latents[:, 3:]
        smooth = F.mse_loss(colours, thumbnail) + FREE_WEIGHT * free.square().mean()
        decoded = vae.decode(latents + NOISE * torch.randn_like(latents)).sample
        error = F.mse_loss(decoded, pixels, reduction="none")
        error = error + 0.5 * F.l1_loss(decoded, pixels, reduction="none")
        background = pixels.flatten(2).median(dim=-1).values[:, :, None, None]
        objects = (pixels - background).abs().amax(1, keepdim=True) > 0.1
        return ((1 + OBJECT_WEIGHT * objects) * error).mean() + smooth

    seconds = fit(vae, recipe, loss_of_step, "toy-vae", state)
    with torch.no_grad():
        # Samples of the posterior are what the decoder was trained on.
        vae.quant_conv.weight[vae.config.latent_channels :] = 0
        vae.quant_conv.bias[vae.config.latent_channels :] = 2 * math.log(NOISE)
        pictures = torch.cat([scenes(recipe, step)[0] for step in range(32)])
        latents = vae.cpu().encode(pictures).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae, seconds
