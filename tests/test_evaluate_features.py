"""How pictures are resized for Inception: by each way's own library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.image import fid

from ecodiff.config.reading import read_settings
from ecodiff.config.sections import EvaluateSettings
from ecodiff.evaluate import features
from ecodiff.runtime.errors import UserError


def picture() -> np.ndarray:
    """One without smooth places: uint8 (1, 400, 350, 3)."""
    rows, columns = np.mgrid[:400, :350]
    planes = (rows * columns % 256, (rows**2 + columns) % 256, (rows > 200) * 255)
    return np.stack(planes, axis=2).astype(np.uint8)[None]


def test_clean_is_what_clean_fid_makes() -> None:
    """The numbers are of `build_resizer("clean")` of clean-fid 0.1.35."""
    found = features.RESIZES["clean"](picture())[0].permute(1, 2, 0)
    expected = [
        [1.1461516618728638, 6.018685340881348, 0.0],
        [176.4389190673828, 43.724979400634766, 0.0],
        [213.56507873535156, 98.48265838623047, 0.0],
        [142.96263122558594, 64.06973266601562, 255.0],
    ]
    torch.testing.assert_close(
        found[[0, 10, 149, 298], [5, 100, 200, 250]], torch.tensor(expected), atol=1e-3, rtol=0
    )


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> fid.NoTrainInceptionV3:
    """Inception of random weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    torch.manual_seed(0)
    return fid.NoTrainInceptionV3("inception-v3-compat", ["2048"])


@pytest.mark.parametrize(("resize", "antialias"), [("torch", True), ("legacy", False)])
def test_other_ways_are_those_of_torchmetrics_and_torch_fidelity(
    network: fid.NoTrainInceptionV3,
    monkeypatch: pytest.MonkeyPatch,
    resize: str,
    antialias: bool,
) -> None:
    """Of 2,048 dimensions: 64 make a number that only looks like FID, fault 23."""

    class Metric:
        def __init__(self, feature: int) -> None:
            assert feature == 2048
            self.inception = network

    monkeypatch.setattr(features, "FrechetInceptionDistance", Metric)
    found = features.inception(resize)(picture())
    network.use_antialias = antialias
    with torch.inference_mode():
        expected = network(torch.from_numpy(picture()).permute(0, 3, 1, 2))
    assert found.shape == (1, 2048)
    torch.testing.assert_close(found, expected)


def test_weights_of_quickgelu_are_refused_on_a_model_without_it() -> None:
    with pytest.raises(UserError, match="write ViT-B-32-quickgelu"):
        read_settings(
            EvaluateSettings, {"clip_model": "ViT-B-32", "clip_pretrained": "openai"}, name="x"
        )
    read_settings(
        EvaluateSettings,
        {"clip_model": "ViT-B-32-quickgelu", "clip_pretrained": "openai"},
        name="x",
    )
