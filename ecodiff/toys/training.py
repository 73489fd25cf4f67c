"""What the trainings of all toys share: the loop, its learning rates and its images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ecodiff.runtime.state import State
from ecodiff.toys import world

SAVE_EVERY = 300.0  # seconds between two writes of an unfinished training's state

# Results differ between devices by rounding; the model card names the hardware.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Recipe:
    """How a toy is trained; its model card shows it.

    Each cycle starts from weights rounded to fp16 and with a new optimiser, as if from a shipped
    toy. So a shipped toy can be trained for another cycle, and a training from scratch repeats it.

    Attributes:
        cycles: number of steps of each cycle.
        batch: images per step.
        lr: highest learning rate.
        warmup: steps of linear warm-up at the start of each cycle.
        seed: of weights, images and noise.
    """

    cycles: tuple[int, ...]  # steps of each
    batch: int
    lr: float
    warmup: int = 100
    seed: int = 0

    @property
    def steps(self) -> int:
        """Steps of all cycles."""
        return sum(self.cycles)

    def starts_cycle(self, step: int) -> bool:
        """Whether a cycle other than the first begins at this step."""
        return step in accumulate(self.cycles[:-1])

    def lr_of(self, step: int) -> float:
        """The learning rate at a step: in each cycle a linear warm-up and a cosine decay to 0."""
        within = step
        for length in self.cycles:
            if within < length:
                break
            within -= length
        rising = (within + 1) / self.warmup
        falling = 0.5 * (1 + math.cos(math.pi * within / length))
        return self.lr * min(rising, falling)


def scenes(recipe: Recipe, step: int) -> tuple[Tensor, list[str]]:
    """The images of a step, float (batch, 3, SIDE, SIDE) in [-1, 1], and their captions."""
    rng = np.random.default_rng([recipe.seed, step])
    batch = [world.sample_scene(rng) for _ in range(recipe.batch)]
    return to_tensor([world.render(scene) for scene in batch]), [s.caption for s in batch]


class Latents:
    """Training images, drawn and encoded once and used again in every epoch."""

    def __init__(self, vae: AutoencoderKL, recipe: Recipe, pictures: int = 30_720) -> None:
        """Encode about `pictures` images; their scaled latents stay on `DEVICE`."""
        self.recipe, self.captions = recipe, []
        latents = []
        for step in range(pictures // recipe.batch):
            pixels, captions = scenes(recipe, step)
            with torch.no_grad():
                latents.append(vae.encode(pixels.to(DEVICE)).latent_dist.mode())
            self.captions += captions
        self.latents = torch.cat(latents) * vae.config.scaling_factor

    def batch(self, step: int) -> tuple[Tensor, list[str]]:
        """The latents of a step, float (batch, 4, 16, 16), and their captions.

        Each epoch is a new random order.
        """
        epoch, part = divmod(step, len(self.captions) // self.recipe.batch)
        order = np.random.default_rng([self.recipe.seed, epoch]).permutation(len(self.captions))
        chosen = order[part * self.recipe.batch :][: self.recipe.batch]
        return self.latents[torch.from_numpy(chosen)], [self.captions[i] for i in chosen]


def to_tensor(images: list[np.ndarray]) -> Tensor:
    """Images, n times uint8 (SIDE, SIDE, 3), as float (n, 3, SIDE, SIDE) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


def fit(
    module: nn.Module,
    recipe: Recipe,
    loss_of_step: Callable[[int], Tensor],
    name: str,
    state: Path | None = None,
) -> float:
    """Train a module in place with AdamW at the recipe's learning rates.

    Args:
        module: what to train.
        recipe: steps, learning rates and seed.
        loss_of_step: the loss (scalar) at a step, counted from 0. Its randomness must come from the
            step or from torch's global generator, which is seeded for each step.
        name: shown with the progress.
        state: safetensors file for the state of an unfinished training. If it exists, training
            continues from it, with the same result as without a stop. Removed at the end.

    Returns:
        The time it took, in seconds.
    """
    module.train()
    # beta2 = 0.99: with the usual 0.999 the average of squared gradients lags behind, and a short
    # training at a high learning rate may diverge.
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.01
    )
    unfinished = State(state, asdict(recipe), dict(module.named_parameters()), optimizer)
    found = unfinished.restore() or {"step": 0, "seconds": 0.0}
    first, before = found["step"], found["seconds"]
    start = written = time.monotonic()
    running = None
    for step in range(first, recipe.steps):
        torch.manual_seed(recipe.seed * 1_000_003 + step)
        if recipe.starts_cycle(step):
            optimizer.state.clear()
            for parameter in module.parameters():
                parameter.data = parameter.data.half().float()
        loss = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_of(step)
        optimizer.step()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        seconds = before + time.monotonic() - start
        if step % 50 == 0 or step == recipe.steps - 1:
            print(
                f"{name} step {step}/{recipe.steps} loss {running:.5f} {seconds:.0f}s", flush=True
            )
        if time.monotonic() - written > SAVE_EVERY:
            unfinished.write({"step": step + 1, "seconds": seconds})
            written = time.monotonic()
    unfinished.discard()
    module.eval()
    return before + time.monotonic() - start
