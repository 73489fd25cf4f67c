"""Genuine pipelines with random weights, small enough to run dozens of times in a test."""

from __future__ import annotations

import torch
from diffusers import FluxPipeline, StableDiffusionXLPipeline

from ecodiff.toys import flux, sdxl, vae

CALLS = {
    "sdxl": {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 64, "width": 64},
    "flux": {"num_inference_steps": 3, "max_sequence_length": 16, "height": 64, "width": 64},
}


def tiny_sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """A StableDiffusionXLPipeline of the toy's shape at a fraction of its width."""
    torch.manual_seed(seed)
    return _awake(sdxl.build(vae.build(), widths=(16, 32, 48)))


def tiny_flux(seed: int = 0) -> FluxPipeline:
    """A FluxPipeline of the toy's shape with two heads, one double and two single blocks."""
    torch.manual_seed(seed)
    return _awake(flux.build(vae.build(), heads=2, double=1, single=2))


def tiny(family: str, seed: int = 0) -> StableDiffusionXLPipeline | FluxPipeline:
    """The tiny pipeline of a family, "sdxl" or "flux"."""
    return {"sdxl": tiny_sdxl, "flux": tiny_flux}[family](seed)


def _awake(pipe: StableDiffusionXLPipeline | FluxPipeline):
    """Random biases, so that a forgotten bias cannot hide behind zeros; quiet bars."""
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
            for name, parameter in module.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.05)
    pipe.set_progress_bar_config(disable=True)
    return pipe
