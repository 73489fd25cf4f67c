"""What every toy's training shares: the loop, its clock and the pictures it learns from."""

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

# Toys are trained where it is fastest; the card says where that was.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Recipe:
    """How one part of a toy is trained; part of its model card.

    Each cycle begins as if from a shipped toy, with weights that went through fp16 and a new
    optimiser, so that a toy can be trained further without its state and still be repeated.
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
        """Whether a cycle, other than the first, begins with this step."""
        return step in accumulate(self.cycles[:-1])

    def lr_of(self, step: int) -> float:
        """The learning rate of a step: in each cycle a linear warm-up, then a cosine to zero."""
        within = step
        for length in self.cycles:
            if within < length:
                break
            within -= length
        rising = (within + 1) / self.warmup
        falling = 0.5 * (1 + math.cos(math.pi * within / length))
        return self.lr * min(rising, falling)


def scenes(recipe: Recipe, step: int) -> tuple[Tensor, list[str]]:
    """A step's pictures, float (batch, 3, SIDE, SIDE) in [-1, 1], and captions."""
    rng = np.random.default_rng([recipe.seed, step])
    batch = [world.sample_scene(rng) for _ in range(recipe.batch)]
    return to_tensor([world.render(scene) for scene in batch]), [s.caption for s in batch]


class Latents:
    """Pictures that are drawn and encoded once and then reused in every epoch."""

    def __init__(self, vae: AutoencoderKL, recipe: Recipe, pictures: int = 30_720) -> None:
        """Encode about `pictures` pictures; their latents, scaled, stay on `DEVICE`."""
        self.recipe, self.captions = recipe, []
        latents = []
        for step in range(pictures // recipe.batch):
            pixels, captions = scenes(recipe, step)
            with torch.no_grad():
                latents.append(vae.encode(pixels.to(DEVICE)).latent_dist.mode())
            self.captions += captions
        self.latents = torch.cat(latents) * vae.config.scaling_factor

    def batch(self, step: int) -> tuple[Tensor, list[str]]:
        """A step's latents, float (batch, 4, 16, 16), and captions; each epoch is shuffled anew."""
        epoch, part = divmod(step, len(self.captions) // self.recipe.batch)
        order = np.random.default_rng([self.recipe.seed, epoch]).permutation(len(self.captions))
        chosen = order[part * self.recipe.batch :][: self.recipe.batch]
        return self.latents[torch.from_numpy(chosen)], [self.captions[i] for i in chosen]


def to_tensor(images: list[np.ndarray]) -> Tensor:
    """uint8 (SIDE, SIDE, 3) pictures as float (n, 3, SIDE, SIDE) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


def fit(
    module: nn.Module,
    recipe: Recipe,
    loss_of_step: Callable[[int], Tensor],
    name: str,
    state: Path | None = None,
) -> float:
    """Trains a module in place: AdamW at the recipe's learning rates.

    Args:
        loss_of_step: the loss (scalar) of a step, counted from 0. All its randomness must come
            from the step or from torch's global generator, which each step seeds.
        state: file (safetensors) that holds an unfinished training, which is continued from there
            and ends as if it had never stopped. Removed at the end.

    Returns:
        The time it took, in seconds.
    """
    module.train()
    # A long memory of squared gradients is what lets a short training at a high rate explode.
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
