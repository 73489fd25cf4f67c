"""Pictures of prompts that nothing is learned from, drawn as a model is retrained: for a person to
look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from ecodiff.models.pipelines import decode, denoise, encode, starting_noise
from ecodiff.models.saving import text_parts
from ecodiff.retrain.trajectory import Trajectory
from ecodiff.runtime.artifacts import atomic

SIDE = 256  # of a picture on a sheet, in pixels


class Sheets:
    """One sheet each time that it is asked, a row of pictures, as `<folder>/<step>.png`.

    The prompts are encoded once; then text encoders make room on the device.

    Args:
        pipe: the pipeline that is retrained, with its text encoders.
        batch: a recorded batch, whose first prompts are drawn.
        count: how many.
        folder: made when the first sheet is drawn.
    """

    def __init__(
        self, pipe: DiffusionPipeline, batch: Trajectory, count: int, folder: Path
    ) -> None:
        self.pipe, self.call, self.folder = pipe, batch.call, folder
        with torch.inference_mode():
            self.embeds = encode(pipe, batch.prompts[:count], self.call)
            self.noise = starting_noise(pipe, batch.seeds[:count], self.call)
        for name in text_parts(pipe.components):
            if isinstance(part := getattr(pipe, name, None), nn.Module):
                part.to("cpu")

    @torch.inference_mode()
    def draw(self, step: int) -> None:
        """Write the sheet of a step."""
        latents = denoise(self.pipe, self.embeds, self.noise, self.call)
        try:
            pictures = decode(self.pipe, latents, self.call)
        except FloatingPointError:  # a model that is lost may draw anything; the loss says so too
            return
        small = [Image.fromarray(one) for one in pictures]
        for one in small:
            one.thumbnail((SIDE, SIDE))
        with atomic(self.folder / f"{step:06d}.png") as scratch:
            Image.fromarray(np.concatenate(small, axis=1)).save(scratch, format="png")
