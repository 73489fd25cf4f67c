from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
from safetensors.torch import save
from tiny import CALLS, tiny, tiny_flux, tiny_sdxl

from ecodiff import prune
from ecodiff.config.sections import EfficiencySettings
from ecodiff.evaluate.efficiency import efficiency
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.runtime import timing

ONCE = EfficiencySettings(repeats=1, warmup=0)
PROMPT = (["a small red ring on navy"], [7])


def half(pipe):
    """The pipeline with the first half of the units of every structure."""
    kept = {s.name: torch.arange(s.units) < s.units // 2 for s in discover(pipe)}
    prune(pipe, kept)
    return pipe


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_a_pruned_variant_costs_less_of_everything(family: str) -> None:
    pipe = tiny(family)
    own = denoiser_of(pipe)
    denoisers = {"dense": lambda: own, "half": lambda: denoiser_of(half(tiny(family)))}
    measured = efficiency(pipe, denoisers, *PROMPT, CALLS[family], ONCE)
    dense, pruned = measured["dense"], measured["half"]
    for key in ("parameters", "denoiser_parameters", "gmacs", "peak_memory_mb", "disk_mb"):
        assert pruned[key] < dense[key], key
    fewer = dense["denoiser_parameters"] - pruned["denoiser_parameters"]
    assert dense["parameters"] - pruned["parameters"] == fewer
    assert denoiser_of(pipe) is own


def test_gmacs_are_those_of_linears_convolutions_and_attention() -> None:
    """Counted by hooks on the modules and by hand for attention."""
    pipe, call, macs = tiny_flux(), CALLS["flux"], Counter()

    def linear(module, args, out) -> None:
        macs["linear"] += out.numel() * module.in_features

    def convolution(module, args, out) -> None:
        macs["convolution"] += out.numel() * module.weight[0].numel()

    for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        for module in part.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(linear)
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(convolution)
    measured = efficiency(pipe, {"dense": lambda: pipe.transformer}, *PROMPT, call, ONCE)["dense"]

    def attention(queries: int, width: int) -> int:
        return 2 * queries**2 * width  # q k^T and its product with v

    text, latents, blocks = 16, 64, 3
    by_hand = call["num_inference_steps"] * blocks * attention(text + latents, 2 * 16)
    by_hand += 2 * 3 * attention(text, 64)  # CLIP and T5, three layers each
    by_hand += attention(16 * 16, 64)  # the middle of the VAE's decoder
    rounds = 2  # the call that counts and the one that is timed
    expected = (macs["linear"] + macs["convolution"]) / rounds + by_hand
    assert measured["gmacs"] == pytest.approx(expected / 1e9, rel=0.01)


def test_both_branches_of_guidance_are_measured() -> None:
    pipe, runs = tiny("qwen"), []
    pipe.transformer.register_forward_hook(lambda *_: runs.append(1))
    efficiency(pipe, {"dense": lambda: pipe.transformer}, *PROMPT, CALLS["qwen"], ONCE)
    rounds = 2  # the call that counts and the one that is timed
    assert len(runs) == rounds * 2 * CALLS["qwen"]["num_inference_steps"]


def test_weights_on_disk_are_what_safetensors_takes() -> None:
    pipe = tiny_sdxl()
    measured = efficiency(pipe, {"dense": lambda: pipe.unet}, *PROMPT, CALLS["sdxl"], ONCE)["dense"]
    size = len(save(pipe.unet.state_dict())) / 1e6
    assert measured["denoiser_disk_mb"] == pytest.approx(size, rel=0.1)  # less the header
    assert measured["denoiser_disk_mb"] == 4 * measured["denoiser_parameters"] / 1e6
    assert measured["disk_mb"] > measured["denoiser_disk_mb"]


def test_variants_take_turns_and_the_median_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from ecodiff.evaluate import efficiency as module

    seconds, turns = iter([9, 9, 1, 10, 3, 30, 2, 20]), []
    monkeypatch.setattr(module, "_size_and_work", lambda *_: {})
    monkeypatch.setattr(timing, "seconds", lambda *_: turns.append(pipe.unet) or next(seconds))
    pipe = tiny_sdxl()
    both = [pipe.unet, tiny_sdxl(1).unet]
    denoisers = {"dense": lambda: both[0], "other": lambda: both[1]}
    settings = EfficiencySettings(repeats=3, warmup=1)
    measured = efficiency(pipe, denoisers, *PROMPT, CALLS["sdxl"], settings)
    assert turns == both * 4
    assert measured["dense"]["latency_ms_per_image"] == 2000
    assert measured["other"]["latency_ms_per_image"] == 20000


def test_an_image_of_a_batch_costs_what_one_alone_does() -> None:
    pipe = tiny_flux()
    one = efficiency(pipe, {"dense": lambda: pipe.transformer}, *PROMPT, CALLS["flux"], ONCE)
    two = efficiency(
        pipe, {"dense": lambda: pipe.transformer}, PROMPT[0] * 2, [7, 8], CALLS["flux"], ONCE
    )
    assert two["dense"]["gmacs"] == pytest.approx(one["dense"]["gmacs"])


def test_variants_are_loaded_in_turn_and_no_two_are_held_at_once() -> None:
    pipe, loaded = tiny_flux(), []

    def load() -> torch.nn.Module:
        assert not any(variant() is not None for variant in loaded)
        found = denoiser_of(half(tiny_flux()))
        loaded.append(weakref.ref(found))
        return found

    own = pipe.transformer
    denoisers = {"dense": lambda: own, "one": load, "other": load}
    settings = EfficiencySettings(repeats=1, warmup=1)
    efficiency(pipe, denoisers, *PROMPT, CALLS["flux"], settings)
    assert len(loaded) == 2 * 3
    assert pipe.transformer is own
