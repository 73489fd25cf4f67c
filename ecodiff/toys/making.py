"""Trains the shipped toys from scratch and writes each as a folder with a model card."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from ecodiff.models.pipelines import decode, denoise, encode, starting_noise
from ecodiff.runtime.artifacts import atomic
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.state import unfinished
from ecodiff.toys import TOYS, checker, clip, flux, sdxl, vae, world
from ecodiff.toys.training import Recipe, to_tensor

CALLS: dict[str, dict[str, int | float]] = {
    "toy-sdxl": {"num_inference_steps": 6, "guidance_scale": 3.0, "height": 64, "width": 64},
    "toy-flux": {"num_inference_steps": 8, "max_sequence_length": 16, "height": 64, "width": 64},
}
BATCH = 64
HELD_OUT = 256  # number of captions that a model card's scores are measured on


def make(name: str, out: Path, vae_folder: Path | None = None) -> None:
    """Train one toy and write it to a folder.

    An unfinished training keeps its state beside `out` and continues from it.

    Args:
        name: one of `TOYS`.
        out: the folder to write, weights in fp16.
        vae_folder: the trained toy-vae; needed for toy-sdxl and toy-flux.

    Raises:
        UserError: there is no such toy, or `vae_folder` is missing.
    """
    if name not in TOYS:
        raise UserError(f"toy: {name!r} is not one of {', '.join(TOYS)}")
    state = unfinished(out)
    if name == "toy-vae":
        model, seconds = vae.train(state=state)
        with atomic(out, folder=True) as folder:
            model.to(torch.float16).save_pretrained(folder)
            scores = {"round trip, scene accuracy": round_trip(model.float())}
            write_card(folder, name, vae.RECIPE, seconds, scores)
    elif name == "toy-clip":
        model, seconds = clip.train(state=state)
        pictures, captions = held_out()
        scores = {
            f"retrieval among {HELD_OUT}": clip.retrieval(model, to_tensor(pictures), captions)
        }
        with atomic(out, folder=True) as folder:
            clip.save(model, folder)
            write_card(folder, name, clip.RECIPE, seconds, scores)
    else:
        if vae_folder is None:
            raise UserError(f"toy: {name} is trained on toy-vae: give its folder")
        module = sdxl if name == "toy-sdxl" else flux
        pipe, seconds = module.train(AutoencoderKL.from_pretrained(vae_folder), state=state)
        with atomic(out, folder=True) as folder:
            pipe.to(torch.float16).save_pretrained(folder)
            scores = {
                f"scene accuracy, {CALLS[name]['num_inference_steps']} steps": accuracy(
                    pipe.to(torch.float32), CALLS[name]
                ),
                "round trip of the autoencoder": round_trip(pipe.vae),
            }
            write_card(folder, name, module.RECIPE, seconds, scores)


def held_out(count: int = HELD_OUT, seed: int = 0) -> tuple[list[np.ndarray], list[str]]:
    """`count` images, uint8 (SIDE, SIDE, 3), and their captions, of the split `held-out`."""
    rng = np.random.default_rng(seed)
    scenes = [world.sample_scene(rng, "held-out") for _ in range(count)]
    return [world.render(scene) for scene in scenes], [scene.caption for scene in scenes]


def round_trip(model: AutoencoderKL) -> float:
    """Scene accuracy of held-out images after encoding and decoding, 0 to 1."""
    pictures, captions = held_out()

    images: list[np.ndarray] = []
    for start in range(0, len(pictures), BATCH):
        with torch.inference_mode():
            latents = model.encode(to_tensor(pictures[start : start + BATCH])).latent_dist.mode()
            pixels = model.decode(latents).sample.clamp(-1, 1).permute(0, 2, 3, 1)
        images += list(((pixels + 1) * 127.5).round().byte().numpy())
    return checker.scene_accuracy(images, captions)


def accuracy(pipe: DiffusionPipeline, call: dict[str, int | float]) -> float:
    """Scene accuracy of a pipeline's images of held-out captions, 0 to 1."""
    _, captions = held_out()
    return checker.scene_accuracy(draw(pipe, captions, call), captions)


def draw(
    pipe: DiffusionPipeline, captions: list[str], call: dict[str, int | float]
) -> list[np.ndarray]:
    """One image per caption, uint8 (SIDE, SIDE, 3), from noise of seed 0, 1, 2, ...

    Args:
        pipe: a toy pipeline.
        captions: what to draw.
        call: arguments of the pipeline's call, see `CALLS`.
    """
    images: list[np.ndarray] = []
    for seeds in torch.arange(len(captions)).split(BATCH):
        embeds = encode(pipe, [captions[seed] for seed in seeds], call)
        noise = starting_noise(pipe, seeds.tolist(), call)
        images += list(decode(pipe, denoise(pipe, embeds, noise, call), call))
    return images


def write_card(
    folder: Path, name: str, recipe: Recipe, seconds: float, scores: dict[str, float]
) -> None:
    """Write the model card, README.md and training.json: recipe, hardware, time and scores."""
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "diffusers", "transformers"))
    hardware = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU thread(s), {platform.machine()}"
    )
    lines = [
        "---",
        "license: mit",
        "tags: [ecodiff, toy, shapeworld]",
        "---",
        f"# {name}",
        "",
        "Trained from nothing on ShapeWorld (see `ecodiff/toys/world.py`). Weights are fp16.",
        "",
        "| | |",
        "|---|---|",
        f"| command | `ecodiff toys train {name}` (all toys: `snakemake toys`) |",
        *(f"| {key} | {value} |" for key, value in asdict(recipe).items()),
        f"| hardware | {hardware} |",
        f"| training time | {seconds / 60:.0f} minutes |",
        f"| date | {date.today().isoformat()} |",
        f"| versions | {packages} |",
        *(
            f"| {key}, {HELD_OUT} held-out captions | {value:.3f} |"
            for key, value in scores.items()
        ),
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines))
    (folder / "training.json").write_text(
        json.dumps({**asdict(recipe), "seconds": round(seconds), **scores}, indent=2) + "\n"
    )
