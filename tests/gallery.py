"""Folders as `generate` writes them, and a small untrained CLIP folder, to judge pictures with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from ecodiff.models.identity import LATENTS, Origin
from ecodiff.toys import text


def write_shard(
    folder: Path,
    index: list[int],
    images: np.ndarray,
    z0: torch.Tensor,
    prompts: list[str] | None = None,
    **origin: object,
) -> Path:
    """A shard; the seed of a prompt is its index, and `origin` changes what it was made of."""
    folder.mkdir(parents=True)
    made = {"model": "m::", "dense": "m::", "call": {}, "seeds": index}
    made["prompts"] = prompts or [f"prompt {number}" for number in index]
    metadata = Origin(**{**made, **origin}).metadata()
    for number, image in zip(index, images, strict=True):
        Image.fromarray(image).save(folder / f"{number:05d}.png")
    save_file({"index": torch.tensor(index), "z0": z0}, folder / LATENTS, metadata=metadata)
    return folder


def write_clip(folder: Path, width: int = 32) -> str:
    """A one-layer open_clip model with the world's tokenizer; returns its `local-dir:` name."""
    tokenizer = text.clip_tokenizer()
    tokenizer.save_pretrained(folder)
    towers = {
        "embed_dim": width,
        "vision_cfg": {
            "image_size": 64,
            "layers": 1,
            "width": 32,
            "patch_size": 16,
            "head_width": 16,
        },
        "text_cfg": {
            "context_length": text.MAX_TOKENS,
            "vocab_size": len(tokenizer),
            "width": 32,
            "heads": 2,
            "layers": 1,
            "hf_tokenizer_name": "local",
        },
    }
    folder.joinpath("open_clip_config.json").write_text(
        json.dumps({"model_cfg": towers, "preprocess_cfg": {}})
    )
    torch.manual_seed(0)
    model = open_clip.CLIP(**towers)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"
