"""toy-sdxl: a small `StableDiffusionXLPipeline` for ShapeWorld, and its training."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from torch.nn import functional as F

from ecodiff.toys import text, world
from ecodiff.toys.training import DEVICE, Latents, Recipe, fit

RECIPE = Recipe(cycles=(5200, 10_000), batch=48, lr=1e-3, warmup=200)
UNCONDITIONAL = 0.1  # share of captions dropped, for classifier-free guidance
WIDTHS = (32, 64, 96)
HEAD_DIM = 16


def build(vae: AutoencoderKL, widths: tuple[int, int, int] = WIDTHS) -> StableDiffusionXLPipeline:
    """The untrained pipeline: a U-Net of three levels with attention on the lower two.

    Args:
        vae: the toys' autoencoder.
        widths: channels of the levels.
    """
    tokenizer = text.clip_tokenizer()
    ids = 8  # width of each embedded size or crop
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=widths,
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        # In spite of its name, the number of heads.
        attention_head_dim=tuple(width // HEAD_DIM for width in widths),
        norm_num_groups=8,
        cross_attention_dim=2 * text.WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=ids,
        projection_class_embeddings_input_dim=6 * ids + text.WIDTH,
    )
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        # At the highest noise, noise prediction carries no information about the image, and a few
        # steps can't correct a wrong background later; v prediction learns it from the first step.
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text.clip_encoder(tokenizer),
        text_encoder_2=text.clip_encoder(tokenizer, projection=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )


def train(
    vae: AutoencoderKL, recipe: Recipe = RECIPE, state: Path | None = None
) -> tuple[StableDiffusionXLPipeline, float]:
    """Train U-Net and text encoders with v prediction.

    Args:
        vae: the trained toy-vae, which is not changed.
        recipe: steps, batch size, learning rate and seed.
        state: see `training.fit`.

    Returns:
        The pipeline on the CPU, and the seconds that training took.
    """
    torch.manual_seed(recipe.seed)
    pipe = build(vae).to(DEVICE)
    trained = nn.ModuleList([pipe.unet, pipe.text_encoder, pipe.text_encoder_2])
    noising = DDPMScheduler.from_config(pipe.scheduler.config)
    data = Latents(pipe.vae, recipe)
    sizes = torch.tensor([[world.SIDE, world.SIDE, 0, 0, world.SIDE, world.SIDE]], device=DEVICE)

    def loss_of_step(step: int) -> torch.Tensor:
        latents, captions = data.batch(step)
        embeds, _, pooled, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
        keep = (torch.rand(len(captions), device=DEVICE) >= UNCONDITIONAL).float()
        noise = torch.randn_like(latents)
        steps = torch.randint(len(noising), (len(captions),), device=DEVICE)
        predicted = pipe.unet(
            noising.add_noise(latents, noise, steps),
            steps,
            encoder_hidden_states=embeds * keep[:, None, None],
            added_cond_kwargs={
                "text_embeds": pooled * keep[:, None],
                "time_ids": sizes.expand(len(captions), -1),
            },
        ).sample
        return F.mse_loss(predicted, noising.get_velocity(latents, noise, steps))

    seconds = fit(trained, recipe, loss_of_step, "toy-sdxl", state)
    return pipe.to("cpu"), seconds
