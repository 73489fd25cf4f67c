"""Time and memory of an iteration of mask learning: `python benchmarks/learning.py`, `make bench`.

The floor is the time of the forward passes alone, timed in the same run: three for a step that is
recomputed (forward, recomputation, and a backward pass counted as one), two for a step whose
activations are kept.
"""

from __future__ import annotations

import argparse
import sys
from datetime import date

import pandas as pd
import torch
from diffusers import DiffusionPipeline

from ecodiff.config.run import load_config
from ecodiff.config.sections import MaskCostSettings
from ecodiff.evaluate.mask_cost import mask_cost
from ecodiff.models.loading import load_pipeline
from ecodiff.models.pipelines import encode, starting_noise
from ecodiff.models.structures import count_parameters, denoiser_of
from ecodiff.toys import sdxl, vae

PROMPT = "a small red ring left of a large blue square on navy"


def middle() -> DiffusionPipeline:
    """An SDXL-shaped U-Net of 48M parameters with random weights, for latents of 32x32."""
    torch.manual_seed(0)
    return sdxl.build(vae.build(), widths=(128, 256, 352))


def measured(
    name: str, pipe: DiffusionPipeline, call: dict, settings: MaskCostSettings
) -> pd.DataFrame:
    """One model's rows of `mask_cost`, with the ratios to the floor and to the memory of T = 10."""
    embeds = encode(pipe, [PROMPT] * settings.batch, call)
    noise = starting_noise(pipe, [*range(settings.batch)], call)
    table = mask_cost(pipe, embeds, noise, call, settings)
    table["x floor"] = table["seconds"] / table["floor_seconds"]
    first = table[table["steps"] == 10].set_index("kept")["peak_memory_mb"]
    table["x memory at T=10"] = table["peak_memory_mb"] / table["kept"].map(first)
    millions = count_parameters(denoiser_of(pipe)) / 1e6
    table.insert(0, "model", f"{name} ({millions:.0f}M, batch {settings.batch})")
    return table


def main() -> None:
    """Measure the toys and the middle-sized model, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 10, 20, 50])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=["toy-sdxl", "toy-flux", "middle"])
    asked = parser.parse_args()
    demo = load_config("config/config.yaml").models
    kept = (0.0, 0.5, 1.0)
    tables = []
    for name in asked.models:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        if name == "middle":
            call, batch = {"guidance_scale": 5.0, "height": 128, "width": 128}, 1
            pipe = middle()
        else:
            call, batch = demo[name].call.model_dump(exclude_none=True), demo[name].mask.batch
            pipe = load_pipeline(demo[name].source)
        settings = MaskCostSettings(
            steps=asked.steps, kept=kept, batch=batch, repeats=asked.repeats
        )
        tables.append(measured(name, pipe, call, settings))
    hardware = f"CPU, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    print(f"{date.today()}, {hardware}, torch {torch.__version__}")
    print(pd.concat(tables).round(3).to_markdown(index=False))


if __name__ == "__main__":
    main()
