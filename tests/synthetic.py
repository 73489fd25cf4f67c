"""A results folder with plausible numbers, as the stages would have left it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from safetensors.numpy import save_file

from ecodiff.config.variants import Variant
from ecodiff.models.identity import LATENTS, Origin
from ecodiff.report.results import Results
from ecodiff.toys import world

PRUNED = [
    *(f"ecodiff-{p}" for p in (10, 20, 30)),
    *(f"ecodiff-{p}-comp" for p in (10, 20, 30)),
    "ecodiff-30-lora",
    *(f"magnitude-{p}" for p in (10, 20, 30)),
    *(f"random-{p}" for p in (10, 20, 30)),
]
SHARD = 5  # prompts
HARM = {"dense": 0.0, "ecodiff": 0.05, "magnitude": 0.6, "random": 1.0}
UNET = [
    (f"{block}.{i}", d)
    for block, depth in (("down_blocks.1", 1), ("down_blocks.2", 2), ("up_blocks.0", 2))
    for i in range(2 if block.startswith("up") else 1)
    for d in range(depth)
]
STRUCTURES = {
    "toy-sdxl": [
        f"{block.replace('.', '.', 1).rsplit('.', 1)[0]}.attentions.{block[-1]}"
        f".transformer_blocks.{d}.{part}"
        for block, d in UNET
        for part in ("attn1.heads", "attn2.heads", "ff.neurons")
    ],
    "toy-flux": [
        *(f"transformer_blocks.{i}.{p}" for i in range(3) for p in ("attn.heads", "ff.neurons")),
        *(f"transformer_blocks.{i}.norm1.modulation" for i in range(3)),
        *(
            f"single_transformer_blocks.{i}.{p}"
            for i in range(11)
            for p in ("attn.heads", "neurons")
        ),
        "norm_out.modulation",
    ],
}


def write_run(
    folder: Path,
    models: tuple[str, ...] = ("toy-sdxl", "toy-flux"),
    pruned: list[str] = PRUNED,
    sets: tuple[str, ...] = ("evaluation",),
) -> Results:
    rng = np.random.default_rng(0)
    scenes = [world.sample_scene(rng, "held-out") for _ in range(10)]
    prompts = folder / "prompts" / "evaluation.parquet"
    prompts.parent.mkdir(parents=True)
    captions = [scene.caption for scene in scenes]
    table = {"index": range(10), "prompt": captions, "seed": range(10), "image": [None] * 10}
    pd.DataFrame(table).to_parquet(prompts)
    for model in models:
        names = ["dense", *pruned]
        cost = {}
        for name in names:
            variant = Variant.parse(name)
            quality = _variant(folder / model, model, variant, scenes, rng)
            for place in sets:
                judged = folder / model / name / "quality" / f"{place}.json"
                judged.parent.mkdir(exist_ok=True)
                judged.write_text(json.dumps(quality | {"fid": quality["fid"] + sets.index(place)}))
            cost[name] = _cost(variant, rng)
        (folder / model / "efficiency.json").write_text(json.dumps(cost))
        _mask_cost().to_csv(folder / model / "mask_cost.csv", index=False)
    return Results(folder, {model: ["dense", *pruned] for model in models}, sets, SHARD)


def harm_of(variant: Variant) -> float:
    better = 0.25 if variant.compensation else 0.5 if variant.retrain else 1.0
    return better * HARM.get(variant.method, 0.3) * (variant.percent / 10) ** 2 / 9


def _variant(
    folder: Path, model: str, variant: Variant, scenes: list[world.Scene], rng: np.random.Generator
) -> dict[str, float | None]:
    harm = harm_of(variant)
    quality = {
        "count": 256,
        "fid": 2 + 60 * harm,
        "kid": 0.001 + 0.05 * harm,
        "kid_std": 0.001,
        "cmmd": 0.02 + harm,
        "clip_score": 0.33 - 0.1 * harm,
        "scene_accuracy": max(0.0, 0.95 - harm),
        "scene_accuracy_one": max(0.0, 0.99 - 0.5 * harm),
        "scene_accuracy_two": max(0.0, 0.91 - 1.5 * harm),
        "ssim": 1 - 0.4 * harm,
        "psnr": None if variant.is_dense else 30 - 12 * harm,
        "latent_error": 1.3 * harm,
        "latent_error_median": 0.1 * harm,
    }
    for first in range(0, len(scenes), SHARD):
        write_latents(folder, variant, range(first, first + SHARD), scenes)
        write_seen(folder, variant, range(first, first + SHARD))
    for index, scene in enumerate(scenes):
        path = (
            folder / variant.name / "images/evaluation" / str(index // SHARD) / f"{index:05d}.png"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        noisy = world.render(scene) + rng.normal(0, 200 * harm, (64, 64, 3))
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(path)
    if variant.retrain:
        steps = np.arange(200)
        loss = 0.2 + np.exp(-steps / 60) * 0.2 + rng.normal(0, 0.02, 200)
        history = pd.DataFrame({"step": steps, "loss": loss, "distillation": 0.0, "seconds": 0.1})
        (folder / variant.name / "model").mkdir(parents=True, exist_ok=True)
        history.to_csv(folder / variant.name / "model" / "history.csv", index=False)
    mask = folder / "masks" / variant.mask
    if variant.is_dense or mask.exists():
        return quality
    mask.mkdir(parents=True)
    kept = {
        f"kept/{name}": rng.random(4 if name.endswith("heads") else 256)
        > 2 * variant.sparsity * i / 20
        for i, name in enumerate(STRUCTURES[model])
    }
    info = {"sparsity": variant.sparsity + 0.0004}
    cut = folder / variant.pruned.name / "model"
    cut.mkdir(parents=True, exist_ok=True)
    save_file(kept, cut / "mask.safetensors", metadata={"ecodiff": json.dumps(info)})
    if variant.method == "ecodiff":
        _learning(variant, rng).to_csv(mask / "history.csv", index=False)
    return quality


def write_latents(
    folder: Path,
    variant: Variant,
    index: range,
    scenes: list[world.Scene],
    **origin: object,
) -> None:
    """What the report reads of a shard's latents; `origin` changes what they were made of."""
    shard = folder / variant.name / "images/evaluation" / str(index[0] // SHARD)
    shard.mkdir(parents=True, exist_ok=True)
    made = {"model": f"{variant.name}::", "dense": "dense::", "call": {}, "seeds": [*index]}
    made["prompts"] = [scenes[i].caption for i in index]
    tensors = {"index": np.array(index)}
    save_file(tensors, shard / LATENTS, metadata=Origin(**{**made, **origin}).metadata())


def write_seen(folder: Path, variant: Variant, index: range) -> None:
    """What the report reads of what was seen of a shard; the dense latents' variance is 4."""
    rows = np.array(index, dtype=np.float64)
    seen = {
        "index": np.array(index),
        "clip_score": 0.9 - 0.01 * rows,
        "ssim": 1 - harm_of(variant) / (1 + rows),
        "latent_error": 4 * harm_of(variant) * (1 + rows),
        "dense_mean": np.full(len(rows), 1.0),
        "dense_square": np.full(len(rows), 5.0),
        "objects": np.ones(len(rows)),
        "shown": rows % 2,
    }
    place = folder / variant.name / "seen/evaluation"
    place.mkdir(parents=True, exist_ok=True)
    save_file(seen, place / f"{index[0] // SHARD}.safetensors")


def _learning(variant: Variant, rng: np.random.Generator) -> pd.DataFrame:
    iteration = np.arange(100)
    aim = variant.sparsity * np.minimum(1, iteration / 30)
    return pd.DataFrame(
        {
            "iteration": iteration,
            "distortion": variant.sparsity**2
            * np.exp(rng.normal(0, 0.4, 100))
            * (1.5 - iteration / 100),
            "expected_sparsity": aim + rng.normal(0, 0.002, 100),
            "target_sparsity": aim,
        }
    )


def _cost(variant: Variant, rng: np.random.Generator) -> dict[str, float | str]:
    left = 1 - variant.sparsity - 0.0004 * (not variant.is_dense)
    time = 400 * (0.3 + 0.7 * left) * rng.uniform(0.97, 1.03)
    return {
        "parameters": round(1.5e6 + 3e6 * left),
        "denoiser_parameters": round(3e6 * left),
        "gmacs": 0.2 + 1.8 * left,
        "latency_ms_per_image": time,
        "latency_ms_low": 0.97 * time,
        "latency_ms_high": 1.05 * time,
        "peak_memory_mb": 22 + 12 * left,
        "disk_mb": 6 + 12 * left,
        "denoiser_disk_mb": 12 * left,
        "device": "CPU",
    }


def _mask_cost() -> pd.DataFrame:
    rows = [
        (
            steps,
            kept,
            steps * (0.5 - 0.12 * kept),
            steps * (3 - kept) / 6,
            60 + (2 + 88 * kept) * steps,
        )
        for steps in (2, 4, 8, 16)
        for kept in (0.0, 0.5, 1.0)
    ]
    columns = ["steps", "kept", "seconds", "floor_seconds", "peak_memory_mb"]
    return pd.DataFrame(rows, columns=columns)
