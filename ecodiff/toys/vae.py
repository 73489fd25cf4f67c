"""toy-vae: the autoencoder of both toys, 64x64 images to 16x16 latents with 4 channels."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from ecodiff.toys.training import DEVICE, Recipe, fit, scenes

RECIPE = Recipe(cycles=(2400,), batch=8, lr=1.5e-3)
OBJECT_WEIGHT = 8.0  # objects cover a tenth of an image but hold nearly all that a caption says
NOISE = 0.1  # standard deviation on latents before decoding: makes it robust to denoising errors
FREE_WEIGHT = 0.05  # keeps the fourth channel, which is no colour, on the scale of the others


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
    """Train the autoencoder and set its scaling factor so that latents have unit variance.

    Three channels are trained towards a thumbnail of the image: a small denoiser learns such smooth
    latents in far fewer steps than those of an unconstrained autoencoder.

    Args:
        recipe: steps, batch size, learning rate and seed.
        state: see `training.fit`.

    Returns:
        The autoencoder on the CPU, and the seconds that training took.
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
        # Set the posterior's variance to that of the noise, so that samples of it are what the
        # decoder was trained on.
        vae.quant_conv.weight[vae.config.latent_channels :] = 0
        vae.quant_conv.bias[vae.config.latent_channels :] = 2 * math.log(NOISE)
        pictures = torch.cat([scenes(recipe, step)[0] for step in range(32)])
        latents = vae.cpu().encode(pictures).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae, seconds
