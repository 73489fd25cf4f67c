"""What retraining wins back on the toys: python benchmarks/retraining.py results/demo

Each line of the table is a base (EcoDiff's mask of the run, cut at a sparsity, least squares) that
is retrained on the dense model's trajectory on prompts of the train split, judged on 128 held-out
captions. A row is printed as soon as it is measured; `--seeds 3` repeats with other orders of the
data.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ecodiff.calibrate import Grams
from ecodiff.config.run import load_config
from ecodiff.config.sections import RetrainSection, RetrainSettings
from ecodiff.mask import Mask
from ecodiff.models.loading import load_pipeline
from ecodiff.models.pipelines import decode, denoise, encode, starting_noise
from ecodiff.prune.cut import prune
from ecodiff.retrain.train import retrain
from ecodiff.retrain.trajectory import record
from ecodiff.toys import checker, world

JUDGED, BATCH = 128, 16
# model, per cent removed, kind, prompts, steps, learning rate
ROWS = [
    ("toy-flux", 60, "lora", 400, 400, 2e-3),
    ("toy-flux", 60, "full", 1000, 600, 1e-3),
    ("toy-flux", 70, "full", 1000, 600, 1e-3),
    ("toy-sdxl", 45, "full", 1000, 600, 1e-3),
]


def captions(seed: int, count: int, split: str) -> list[str]:
    """Captions of ShapeWorld."""
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng, split).caption for _ in range(count)]


class Judge:
    """Compares pictures of held-out captions with the captions and with the dense latents."""

    def __init__(self, dense: DiffusionPipeline, call: dict[str, object]) -> None:
        self.call, self.captions = call, captions(20_000, JUDGED, "held-out")
        with torch.inference_mode():
            self.embeds = encode(dense, self.captions, call)
            self.noise = starting_noise(dense, list(range(20_000, 20_000 + JUDGED)), call)
            self.z0 = denoise(dense, self.embeds, self.noise, call)

    def __call__(self, pipe: DiffusionPipeline) -> str:
        """Scenes (%), mean and median (10^-3) of the relative latent error."""
        with torch.inference_mode():
            z0 = denoise(pipe, self.embeds, self.noise, self.call)
            pictures = decode(pipe, z0, self.call)
        errors = (z0 - self.z0).square().flatten(1).mean(1) / self.z0.var()
        met = [checker.meets(p, c) for p, c in zip(pictures, self.captions, strict=True)]
        return f"{100 * np.mean(met):.1f} | {errors.mean():.4f} | {1e3 * errors.median():.2f}"


def main() -> None:
    """Measures and prints all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="results/<run> with masks and grams of the toys")
    parser.add_argument("--seeds", type=int, default=1)
    chosen = parser.parse_args()
    models = load_config(chosen.run / "config.yaml").models
    head = "model removed kind prompts steps lr seed seconds scenes_% mean_error median_10^-3"
    print(f"| {' | '.join(head.split())} |")
    print("|---" * 11 + "|")
    for name, percent, kind, count, steps, lr in ROWS:
        call = models[name].call.model_dump(exclude_none=True)
        dense = load_pipeline(models[name].source)
        judge, head = Judge(dense, call), f"| {name} | {percent} %"
        print(f"{head} | | | | | | | {judge(based_on(chosen.run, name, percent, dense))} |")
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            dense = load_pipeline(models[name].source)
            seeds = list(range(40_000, 40_000 + count))
            record(dense, captions(40_000, count, "train"), seeds, call, BATCH, Path(folder))
            recorded = time.perf_counter() - begun
            defaults = RetrainSection().model_dump()[kind]
            for seed in range(chosen.seeds):
                pipe = based_on(chosen.run, name, percent, load_pipeline(models[name].source))
                changes = {"steps": steps, "lr": lr, "seed": seed}
                begun = time.perf_counter()
                retrain(pipe, [Path(folder)], RetrainSettings(**{**defaults, **changes}))
                took = recorded + time.perf_counter() - begun
                print(
                    f"{head} | {kind} | {count} | {steps} | {lr:g} | {seed} | {took:.0f}"
                    f" | {judge(pipe)} |",
                    flush=True,
                )


def based_on(run: Path, name: str, percent: int, pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pruned and compensated pipeline that retraining starts from."""
    mask = Mask.load(run / name / "masks/ecodiff-20/mask.safetensors").at(pipe, percent / 100)
    prune(pipe, mask, Grams.load(run / name / "grams.safetensors"))
    return pipe


if __name__ == "__main__":
    main()
