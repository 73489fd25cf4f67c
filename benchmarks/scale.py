"""Time and memory against the number of pictures: `python benchmarks/scale.py 100 1000 10000`.

For each number: planning a run of ten variants with so many pictures each, at 500 a shard; looking
at a shard of pictures (`ecodiff evaluate see`, a job a shard, 64 x 64 pixels, toy-clip); judging a
variant by what was seen of all (`quality`), with stub features of the width of CLIP ViT-B/16,
without and with 100 resampled sets. Seconds of one core, and the largest memory of the process.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from planning import ROOT, measured, planned
from safetensors.torch import save_file

from ecodiff.config.sections import EvaluateSettings
from ecodiff.evaluate.shards import write_seen
from ecodiff.models.identity import LATENTS, Origin

SHARD, WIDTH, VARIANTS = 500, 512, 10
CLIP = ROOT / "resources/toys/toy-clip"
SETTINGS = EvaluateSettings(
    features="clip", clip_model=f"local-dir:{CLIP}", clip_pretrained=None, resamples=0
)


def looked(count: int) -> dict[str, float]:
    """`see` of one shard of so many noisy pictures, with themselves as the dense model's."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        folder, shard = Path(place), Path(place) / "shard"
        shard.mkdir()
        prompts, seeds = [f"picture {i}" for i in range(count)], [*range(count)]
        table = {"index": seeds, "prompt": prompts, "seed": seeds, "image": [None] * count}
        pd.DataFrame(table).to_parquet(folder / "prompts.parquet")
        for number in range(count):
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(shard / f"{number:05d}.png")
        origin = Origin(model="m::", dense="m::", call={}, prompts=prompts, seeds=seeds)
        z0 = {"index": torch.arange(count), "z0": torch.randn(count, 4, 8, 8)}
        save_file(z0, shard / LATENTS, metadata=origin.metadata())
        command = _ecodiff(
            "see", "prompts.parquet", "shard", "seen.safetensors", "--dense", "shard"
        )
        return measured([*command, "--settings", _yaml(0)], folder)[1]


def judged(count: int, resamples: int) -> dict[str, float]:
    """`quality` of so many pictures and as many real ones."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        command = _ecodiff("quality", "quality.json", "--settings", _yaml(resamples))
        for number, start in enumerate(range(0, count, SHARD)):
            rows = min(SHARD, count - start)
            for kind in ("seen", "real"):
                _stub(folder / f"{kind}-{number}.safetensors", start, rows, generator)
                command += [f"--{kind}", f"{kind}-{number}.safetensors"]
        return measured(command, folder)[1]


def _stub(path: Path, start: int, rows: int, generator: torch.Generator) -> None:
    """What is seen of a shard, made up."""
    scores = ("clip_score", "ssim", "squared_error", "latent_error", "objects", "shown")
    seen = {key: torch.rand(rows, generator=generator).double() for key in scores}
    seen |= {"dense_mean": torch.zeros(rows).double(), "dense_square": torch.ones(rows).double()}
    seen["index"] = torch.arange(start, start + rows)
    seen["embeddings"] = torch.randn(rows, WIDTH, generator=generator)
    write_seen(path, seen, SETTINGS, (64, 64))


def _ecodiff(*words: str) -> list[str]:
    return [sys.executable, "-m", "ecodiff", "evaluate", *words]


def _yaml(resamples: int) -> str:
    chosen = {"features": "clip", "clip_model": f"local-dir:{CLIP}", "resamples": resamples}
    return "{" + ", ".join(f"{k}: {v!r}" for k, v in chosen.items()) + ", clip_pretrained: null}"


def main(counts: list[int]) -> None:
    """Print a row a number of pictures."""
    rows = []
    for count in counts:
        shards = -(-count // SHARD)
        parts = {
            f"planning {VARIANTS} variants": planned(VARIANTS, shards),
            "see, a shard": looked(min(count, SHARD)),
            "quality": judged(count, 0),
            "quality, 100 resamples": judged(count, 100),
        }
        row: dict[str, float] = {"pictures": count, "shards": shards}
        for name, taken in parts.items():
            row |= {f"{name}, s": taken["seconds"], f"{name}, MB": taken["MB"]}
        rows.append(row)
        print(pd.DataFrame(rows[-1:]).round(1).to_markdown(index=False), flush=True)
    print(pd.DataFrame(rows).round(1).to_markdown(index=False))


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [100, 1000, 10000])
