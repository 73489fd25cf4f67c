"""Prune your own pipeline: python docs/prune_your_own.py <model> <prompts> <steps> <folder>."""

import sys
from pathlib import Path

import ecodiff
from ecodiff.models.loading import load_pipeline

model, prompts, steps, folder = sys.argv[1:]
pipe = load_pipeline(model)  # dtype="bfloat16", device="cuda" for large ones
call = {"num_inference_steps": int(steps)}  # as you draw: guidance_scale, height, width too
mask = ecodiff.learn_mask(pipe, Path(prompts).read_text().splitlines(), 0.2, call=call)
ecodiff.prune(pipe, mask)
ecodiff.save(pipe, folder)
