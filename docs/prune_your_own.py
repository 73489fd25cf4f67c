"""Prune your own pipeline: python docs/prune_your_own.py <model> <prompts> <steps> <folder>."""

import sys
from pathlib import Path

from diffusers import DiffusionPipeline

import ecodiff

model, prompts, steps, folder = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(model, use_safetensors=True)  # .to("cuda")
call = {"num_inference_steps": int(steps)}  # as you draw: guidance_scale, height, width too
mask = ecodiff.learn_mask(pipe, Path(prompts).read_text().splitlines(), 0.2, call=call)
ecodiff.prune(pipe, mask)
ecodiff.save(pipe, folder)
