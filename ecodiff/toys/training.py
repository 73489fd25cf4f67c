"""What every toy's training shares: the loop, its clock and the pictures it learns from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from ecodiff.toys import world

# Toys are trained where it is fastest; the card says where that was.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Recipe:
    """How one part of a toy is trained; part of its model card."""

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    seed: int = 0


def scenes(recipe: Recipe) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Endless batches of pictures, float (batch, 3, SIDE, SIDE) in [-1, 1], and captions."""
    rng = np.random.default_rng(recipe.seed)
    while True:
        batch = [world.sample_scene(rng) for _ in range(recipe.batch)]
        yield to_tensor([world.render(s) for s in batch]), [s.caption for s in batch]


def latent_batches(
    vae: AutoencoderKL, recipe: Recipe, pictures: int = 15_360
) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Endless shuffled batches of scaled latents, float (batch, 4, 16, 16), and captions.

    The pictures are drawn and encoded once and then reused in every epoch; they stay on `DEVICE`.
    """
    source, latents, captions = scenes(recipe), [], []
    with torch.no_grad():
        while len(captions) < pictures:
            pixels, said = next(source)
            encoded = vae.encode(pixels.to(DEVICE)).latent_dist.mode()
            latents.append(encoded * vae.config.scaling_factor)
            captions += said
    stored = torch.cat(latents)
    while True:
        for chosen in torch.randperm(len(captions)).split(recipe.batch):
            yield stored[chosen.to(DEVICE)], [captions[i] for i in chosen]


def to_tensor(images: list[np.ndarray]) -> torch.Tensor:
    """uint8 (SIDE, SIDE, 3) pictures as float (n, 3, SIDE, SIDE) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


def fit(
    module: nn.Module, recipe: Recipe, loss_of_step: Callable[[int], torch.Tensor], name: str
) -> float:
    """Trains a module in place: AdamW, one warm-up and a cosine decay to zero.

    Args:
        loss_of_step: the loss (scalar) of a step, counted from 0.

    Returns:
        The time it took, in seconds.
    """
    start = time.monotonic()
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=recipe.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=recipe.lr,
        total_steps=recipe.steps,
        pct_start=min(recipe.warmup / recipe.steps, 0.3),
        cycle_momentum=False,
    )
    running = 0.0
    for step in range(recipe.steps):
        loss = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0 or step == recipe.steps - 1:
            elapsed = time.monotonic() - start
            print(
                f"{name} step {step}/{recipe.steps} loss {running:.5f} {elapsed:.0f}s", flush=True
            )
    module.eval()
    return time.monotonic() - start
