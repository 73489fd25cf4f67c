"""toy-clip: a small open_clip model trained on ShapeWorld, for the toys' FID and CLIP score."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from ecodiff.toys import text, world
from ecodiff.toys.training import DEVICE, Recipe, fit, scenes

RECIPE = Recipe(cycles=(1500,), batch=96, lr=1e-3)
CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": world.SIDE,
        "patch_size": 8,
        "width": 96,
        "head_width": 24,
        "layers": 4,
    },
    "text_cfg": {
        "context_length": text.MAX_TOKENS,
        "vocab_size": len(text.t5_tokenizer()),
        "hf_tokenizer_name": "toy-clip",  # a local folder's own tokenizer replaces the name
        "tokenizer_kwargs": {"clean": "lower"},
        "width": 96,
        "heads": 4,
        "layers": 3,
        "pool_type": "eos",
        "eos_id": 1,
        "pad_id": 0,
    },
}
PREPROCESS = {
    "size": [world.SIDE, world.SIDE],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


class _Matching(nn.Module):
    """A CLIP model whose forward pass returns the contrastive loss of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = CLIP(**CONFIG)
        self.loss = ClipLoss()

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        image, words, scale = self.clip(pixels, tokens)
        return self.loss(image, words, scale.clamp(max=100))


def train(recipe: Recipe = RECIPE, state: Path | None = None) -> tuple[CLIP, float]:
    """Train with the contrastive loss on images and captions of ShapeWorld.

    Args:
        recipe: steps, batch size, learning rate and seed.
        state: see `training.fit`.

    Returns:
        The model on the CPU, and the seconds that training took.
    """
    torch.manual_seed(recipe.seed)
    tokenizer, matching = text.t5_tokenizer(), _Matching().to(DEVICE)

    def loss_of_step(step: int) -> torch.Tensor:
        pixels, captions = scenes(recipe, step)
        return matching(pixels.to(DEVICE), tokenize(tokenizer, captions).to(DEVICE))

    seconds = fit(matching, recipe, loss_of_step, "toy-clip", state)
    return matching.clip.cpu(), seconds


def tokenize(tokenizer: text.T5Tokenizer, captions: list[str]) -> torch.Tensor:
    """Padded token ids, int64 (captions, MAX_TOKENS)."""
    return tokenizer(
        captions, padding="max_length", max_length=text.MAX_TOKENS, return_tensors="pt"
    ).input_ids


def save(model: CLIP, folder: Path) -> None:
    """Write the model, weights in fp16, as a folder that open_clip loads with `local-dir:`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: t.to(torch.float16).contiguous() for name, t in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    text.t5_tokenizer().save_pretrained(folder)


def retrieval(model: CLIP, pixels: torch.Tensor, captions: list[str]) -> float:
    """The share of images, 0 to 1, whose own caption is the nearest of all given ones.

    Args:
        model: the CLIP model.
        pixels: float (n, 3, SIDE, SIDE) in [-1, 1].
        captions: n captions.
    """
    tokens = tokenize(text.t5_tokenizer(), captions)
    with torch.no_grad():
        image = F.normalize(model.encode_image(pixels), dim=-1)
        words = F.normalize(model.encode_text(tokens), dim=-1)
    nearest = (image @ words.T).argmax(dim=1)
    return (nearest == torch.arange(len(captions))).float().mean().item()
