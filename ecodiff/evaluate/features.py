"""What FID, KID and the CLIP score compare: features of images and texts by loaded networks."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchmetrics.image.fid import FrechetInceptionDistance

from ecodiff.config.checks import inception_weights
from ecodiff.config.sections import EvaluateSettings, Resize
from ecodiff.runtime.errors import UserError, first_line

Features = Callable[[np.ndarray], Tensor]
"""uint8 images (n, height, width, 3) to float32 features (n, d) on the CPU."""
SIDE = 299  # pixels of what Inception sees


class Clip:
    """An open_clip model with its own tokenizer and its own *evaluation* preprocessing."""

    def __init__(
        self, name: str, pretrained: str | None, device: str = "cpu", key: str = "clip_model"
    ) -> None:
        """Loads a model.

        Args:
            name: a model of open_clip, or `local-dir:<folder>` with `open_clip_config.json` and
                safetensors weights.
            pretrained: which weights of open_clip; None for a folder.
            device: where it runs.
            key: of the section `evaluate` that names it, for errors.

        Raises:
            UserError: the model or its weights are missing or damaged.
        """
        _, local, folder = name.partition("local-dir:")
        if local and not list(Path(folder).glob("*.safetensors")):
            raise UserError(f"evaluate.{key}: {folder} holds no safetensors weights")
        try:
            self.model, self.preprocess = open_clip.create_model_from_pretrained(
                name, pretrained=pretrained, device=device
            )
            self.tokenize = open_clip.get_tokenizer(name)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"evaluate.{key}: {name} cannot be loaded: {reason}") from error
        self.model.eval()
        self.device = device

    @torch.inference_mode()
    def images(self, images: np.ndarray) -> Tensor:
        """Image embeddings, not normalised: uint8 (n, height, width, 3) to float32 (n, d)."""
        batch = torch.stack([self.preprocess(Image.fromarray(image)) for image in images])
        return self.model.encode_image(batch.to(self.device)).float().cpu()

    @torch.inference_mode()
    def texts(self, captions: list[str]) -> Tensor:
        """Text embeddings, not normalised: float32 (n, d)."""
        return self.model.encode_text(self.tokenize(captions).to(self.device)).float().cpu()


class Networks:
    """All that pictures are looked at by, loaded once."""

    def __init__(self, settings: EvaluateSettings, device: str = "cpu") -> None:
        """Loads what the section `evaluate` names. Raises `UserError` when it cannot be had."""
        self.clip = Clip(settings.clip_model, settings.clip_pretrained, device)
        self._others: dict[str, Features] = {}
        if settings.features == "inception":
            self._others["features"] = inception(settings.resize, device)
        if settings.cmmd_model is not None:
            own = Clip(settings.cmmd_model, settings.cmmd_pretrained, device, "cmmd_model")
            self._others["cmmd"] = own.images

    def __call__(self, images: np.ndarray) -> dict[str, Tensor]:
        """What each network makes of uint8 images (n, height, width, 3): float32 (n, d).

        `embeddings` by CLIP, not normalised; `features`, which FID and KID compare, and `cmmd`
        unless they are the same.
        """
        others = {name: look(images) for name, look in self._others.items()}
        return {"embeddings": self.clip.images(images), **others}


def inception(resize: Resize, device: str = "cpu") -> Features:
    """The 2048 pool features that FID and KID are published with, by torch-fidelity's network.

    Args:
        resize: how pictures are made 299 pixels wide and high, on which FID depends by several
            points: see `RESIZES`.
        device: where the network runs.

    Raises:
        UserError: its weights are not here and cannot be fetched, or are damaged.
    """
    try:
        network = FrechetInceptionDistance(feature=2048).inception
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"evaluate.features: the weights of Inception cannot be read from {inception_weights()}"
            f" or fetched ({first_line(error)}); put that file there, or set features: clip"
        ) from error
    # All but the last layer, which classifies, in the order of the forward pass.
    pooled = nn.Sequential(*list(network.children())[:-1]).to(device)

    @torch.inference_mode()
    def features(images: np.ndarray) -> Tensor:
        batch = RESIZES[resize](images).to(device)
        return pooled((batch - 128) / 128).flatten(1).float().cpu()

    return features


def _clean(images: np.ndarray) -> Tensor:
    """As clean-fid (Parmar et al. 2022): Pillow's antialiased bicubic, not rounded to 8 bits."""
    planes = [
        np.asarray(Image.fromarray(plane).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        for image in images
        for plane in image.astype(np.float32).transpose(2, 0, 1)
    ]
    return torch.from_numpy(np.stack(planes)).clip(0, 255).reshape(len(images), 3, SIDE, SIDE)


def _torch(images: np.ndarray) -> Tensor:
    """As torchmetrics: torch's antialiased bilinear."""
    return F.interpolate(_planes(images), size=(SIDE, SIDE), mode="bilinear", antialias=True)


def _legacy(images: np.ndarray) -> Tensor:
    """As torch-fidelity and the first code of FID: TensorFlow 1's bilinear, not antialiased."""
    planes = _planes(images)
    return interpolate_bilinear_2d_like_tensorflow1x(planes, (SIDE, SIDE), align_corners=False)


def _planes(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float()


# Each takes uint8 images (n, height, width, 3) to float32 levels (n, 3, SIDE, SIDE) of 0 to 255.
RESIZES: dict[Resize, Callable[[np.ndarray], Tensor]] = {
    "clean": _clean,
    "torch": _torch,
    "legacy": _legacy,
}
