"""The autoencoder that both toys share: 64x64 pictures to 16x16 latents of 4 channels."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from ecodiff.toys.training import Recipe, fit, scenes

RECIPE = Recipe(steps=2200, batch=16, lr=2e-3)
KL_WEIGHT = 1e-6


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


def train(recipe: Recipe = RECIPE) -> tuple[AutoencoderKL, float]:
    """The trained autoencoder, its scaling factor set to give unit latents, and the seconds."""
    torch.manual_seed(recipe.seed)
    vae, batches = build(), scenes(recipe)

    def loss_of_step(_: int) -> torch.Tensor:
        pixels, _captions = next(batches)
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        fidelity = F.mse_loss(decoded, pixels) + 0.5 * F.l1_loss(decoded, pixels)
        return fidelity + KL_WEIGHT * posterior.kl().mean()

    seconds = fit(vae, recipe, loss_of_step, "vae")
    with torch.no_grad():
        latents = torch.cat([vae.encode(next(batches)[0]).latent_dist.mode() for _ in range(16)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae, seconds
