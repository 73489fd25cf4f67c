"""The real denoisers, on the meta device: their sizes, and what of them can be removed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from accelerate import init_empty_weights

from ecodiff.mask.select import removed_share, select
from ecodiff.models.structures import count_parameters, discover, maskable_share

CONFIGS = Path(__file__).parent / "configs"
# 10^9 parameters; heads, neurons and modulation in percent of them.
EXPECTED = {
    "sd15": (0.8595, 10.9, 17.3, 0.0),
    "sd2": (0.8659, 11.5, 17.2, 0.0),
    "sdxl": (2.567, 37.2, 47.9, 0.0),
    "sd3-medium": (2.028, 22.2, 43.7, 33.3),
    "sd35-medium": (2.243, 25.6, 39.6, 34.2),
    "sd35-large": (8.057, 22.3, 44.1, 33.3),
    "flux": (11.90, 24.1, 48.2, 27.3),
    "chroma": (8.900, 32.2, 64.5, 0.0),
    "ovis": (7.370, 20.0, 59.9, 19.9),
    "auraflow": (6.830, 22.1, 44.2, 33.4),
    "pixart-sigma": (0.6109, 48.7, 48.7, 1.3),
    "qwen-image": (20.43, 22.2, 44.4, 33.4),
    "z-image": (6.155, 32.6, 65.2, 2.1),
    "sana": (1.605, 50.0, 47.1, 1.9),
    "wan": (1.419, 0.0, 58.2, 0.0),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=EXPECTED)
def model(request):
    facts = json.loads((CONFIGS / f"{request.param}.json").read_text())
    config = facts["config"]
    if "pos_embed_max_size" in config:  # a table of gigabytes, none of it parameters
        config["pos_embed_max_size"] = 1
    with init_empty_weights():
        denoiser = getattr(diffusers, facts["class"])(**config)
    return SimpleNamespace(
        expected=EXPECTED[request.param],
        structures=discover(denoiser),
        total=count_parameters(denoiser),
    )


def test_every_config_is_checked():
    assert {path.stem for path in CONFIGS.glob("*.json")} == EXPECTED.keys()


def test_size_and_shares_are_the_known_ones(model):
    size, *shares = model.expected
    assert model.total / 1e9 == pytest.approx(size, rel=5e-4)
    for kind, share in zip(("heads", "neurons", "modulation"), shares, strict=True):
        found = maskable_share([s for s in model.structures if s.kind == kind], model.total)
        assert 100 * found == pytest.approx(share, abs=0.1), kind


def test_a_fifth_is_removed_to_the_unit(model):
    generator = torch.Generator().manual_seed(0)
    scores = {s.name: torch.rand(s.units, generator=generator) for s in model.structures}
    kept = select(model.structures, scores, 0.2, model.total)
    goes = {
        s: scores[s.name][~kept[s.name]].max() for s in model.structures if not kept[s.name].all()
    }
    last = max(goes, key=goes.get)
    over = removed_share(model.structures, kept, model.total) * model.total - 0.2 * model.total
    assert -1 < over < last.unit_parameters
    stays = min(scores[name][units].min() for name, units in kept.items() if units.any())
    assert goes[last] <= stays  # among so many units some scores are equal
