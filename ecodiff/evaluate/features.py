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
from torchmetrics.image.fid import FrechetInceptionDistance

from ecodiff.config.checks import inception_weights
from ecodiff.runtime.errors import UserError, first_line

Features = Callable[[np.ndarray], Tensor]
"""uint8 images (n, height, width, 3) to float32 features (n, d) on the CPU."""


class Clip:
    """An open_clip model with its own tokenizer and its own *evaluation* preprocessing."""

    def __init__(self, name: str, pretrained: str | None, device: str = "cpu") -> None:
        """Loads a model.

        Args:
            name: a model of open_clip, or `local-dir:<folder>` with `open_clip_config.json` and
                safetensors weights.
            pretrained: which weights of open_clip; None for a folder.

        Raises:
            UserError: the model or its weights are missing or damaged.
        """
        _, local, folder = name.partition("local-dir:")
        if local and not list(Path(folder).glob("*.safetensors")):
            raise UserError(f"evaluate.clip_model: {folder} holds no safetensors weights")
        try:
            self.model, self.preprocess = open_clip.create_model_from_pretrained(
                name, pretrained=pretrained, device=device
            )
            self.tokenize = open_clip.get_tokenizer(name)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"evaluate.clip_model: {name} cannot be loaded: {reason}") from error
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


def inception(device: str = "cpu") -> Features:
    """The 2048 pool features that FID and KID are published with, by torchmetrics' own network.

    Raises:
        UserError: its weights are not here and cannot be fetched, or are damaged.
    """
    try:
        network = FrechetInceptionDistance(feature=2048).inception.to(device)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"evaluate.features: the weights of Inception cannot be read from {inception_weights()}"
            f" or fetched ({first_line(error)}); put that file there, or set features: clip"
        ) from error

    @torch.inference_mode()
    def features(images: np.ndarray) -> Tensor:
        batch = torch.from_numpy(images).permute(0, 3, 1, 2)
        return network(batch.to(device)).float().cpu()

    return features


class Precomputed(nn.Identity):
    """Lets torchmetrics take features in the place of images, so that they are computed once."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
