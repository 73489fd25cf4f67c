"""Habits of users: compiled, offloaded, adapted or fused models work, or are refused in a line."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import (
    ControlNetModel,
    FluxTransformer2DModel,
    StableDiffusionXLControlNetPipeline,
)
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny import CALLS, calibrated, tiny, whole_mask, z0

import ecodiff
from ecodiff.calibrate import calibrate
from ecodiff.models.pipelines import fingerprint
from ecodiff.models.pruned import Pruned
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.runtime.errors import UserError
from ecodiff.trajectory.gates import Gates

NAMES = {"sdxl": "unet", "flux": "transformer"}
FAMILIES = ("sdxl", "flux")


def some_units(pipe):
    return {s.name: torch.arange(s.units) % 3 > 0 for s in discover(pipe)}


def pruned(family):
    pipe = tiny(family)
    ecodiff.prune(pipe, some_units(pipe))
    return pipe


def compiled(family):
    """A pipeline whose denoiser is compiled, and has run."""
    pipe = tiny(family)
    setattr(pipe, NAMES[family], torch.compile(denoiser_of(pipe), backend="eager"))
    z0(pipe, family)
    return pipe


def close(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)


def test_a_compiled_unet_is_the_one_it_wraps():
    pipe = tiny("sdxl")
    unet, structures = pipe.unet, discover(pipe)
    pipe.unet = torch.compile(unet, backend="eager")
    assert denoiser_of(pipe) is unet
    assert discover(pipe) == discover(pipe.unet) == structures


def test_compiled_models_are_pruned_and_saved_as_what_they_wrap(tmp_path):
    dense, pipe, expected = tiny("flux"), compiled("flux"), z0(pruned("flux"), "flux")
    assert fingerprint(pipe) == fingerprint(dense)
    ecodiff.prune(pipe, whole_mask(dense, some_units(dense)))
    close(z0(pipe, "flux"), expected)
    wrapped = pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    ecodiff.save(pipe, tmp_path / "model")
    assert pipe.transformer is wrapped
    close(z0(ecodiff.load(tmp_path / "model"), "flux"), expected)


def test_gates_count_in_a_model_that_was_compiled_before():
    pipe, kept = compiled("flux"), some_units(tiny("flux"))
    gates = Gates(discover(pipe))
    gates.set(kept)
    with gates.attached(denoiser_of(pipe)):
        close(z0(pipe, "flux"), z0(pruned("flux"), "flux"))


def test_a_compiled_model_is_calibrated_and_scored_as_it_is():
    plain, expected = calibrated("flux")
    pipe = compiled("flux")
    found = calibrate(pipe, ["a red square", "a blue ring"], [1, 2], CALLS["flux"], 2)
    assert found.means.keys() == expected.means.keys()
    for name, mean in expected.means.items():
        close(found.means[name], mean)
    first, second = (
        ecodiff.score(one, "sensitivity", calibration=expected) for one in (plain, pipe)
    )
    for name, scores in first.items():
        torch.testing.assert_close(second[name], scores)


def test_a_mask_of_another_model_is_refused_under_a_wrapper():
    other = tiny("flux", seed=1)
    with pytest.raises(UserError, match="another model"):
        ecodiff.prune(compiled("flux"), whole_mask(other, some_units(other)))


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_of_attention_by_default(family):
    pipe = tiny(family)
    ecodiff.prune(pipe, {s.name: torch.arange(s.units) == 0 for s in discover(pipe)})
    before = z0(pipe, family)
    pipe.enable_attention_slicing()
    close(z0(pipe, family), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_an_adapter_is_saved_once_it_is_merged(family, tmp_path):
    pipe = pruned(family)
    denoiser_of(pipe).add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "linear"], init_lora_weights=False)
    )
    tuned = z0(pipe, family)
    with pytest.raises(UserError, match=r"save: .* has an adapter; merge it"):
        ecodiff.save(pipe, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    pipe.fuse_lora(components=[NAMES[family]])
    pipe.unload_lora_weights()
    ecodiff.save(pipe, tmp_path / "model")
    close(z0(ecodiff.load(tmp_path / "model"), family), tuned)


def test_fused_projections_are_refused(tmp_path):
    pipe = pruned("sdxl")
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(UserError, match="save: unet: projections were fused"):
        ecodiff.save(pipe, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def offload_groups(pipe):
    apply_group_offloading(
        denoiser_of(pipe),
        onload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )


def offload_layers(pipe):
    pipe.enable_sequential_cpu_offload(device="cpu")


@pytest.mark.parametrize("offload", [offload_layers, offload_groups])
def test_offloaded_weights_are_not_pruned(offload):
    pipe = tiny("flux")
    kept, mask = some_units(pipe), whole_mask(pipe, some_units(pipe))
    offload(pipe)
    for given in (kept, mask):
        with pytest.raises(UserError, match=r"FluxTransformer2DModel is offloaded; do this before"):
            ecodiff.prune(pipe, given)
    assert type(pipe.transformer) is FluxTransformer2DModel


def test_offloaded_weights_are_not_saved_and_are_once_they_are_back(tmp_path):
    pipe = pruned("flux")
    before = z0(pipe, "flux")
    offload_layers(pipe)
    with pytest.raises(UserError, match="is offloaded"):
        ecodiff.save(pipe, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    pipe.remove_all_hooks()
    ecodiff.save(pipe, tmp_path / "model")
    close(z0(ecodiff.load(tmp_path / "model"), "flux"), before)


def test_a_model_that_is_offloaded_as_a_whole_is_pruned():
    pipe = tiny("flux")
    pipe.enable_model_cpu_offload(device="cpu")
    ecodiff.prune(pipe, some_units(tiny("flux")))
    close(z0(pipe, "flux"), z0(pruned("flux"), "flux"))


def test_the_config_of_a_loaded_model_is_the_saved_one(tmp_path):
    ecodiff.save(pruned("flux"), tmp_path / "first")
    ecodiff.save(ecodiff.load(tmp_path / "first"), tmp_path / "second")
    first, second = (
        json.loads((tmp_path / name / "transformer/config.json").read_text())
        for name in ("first", "second")
    )
    assert first["auto_map"] == {"AutoModel": "ecodiff.PrunedFluxTransformer2DModel"}
    ignored = {"_name_or_path"}
    assert {k: v for k, v in first.items() if k not in ignored} == {
        k: v for k, v in second.items() if k not in ignored
    }


@pytest.mark.parametrize("targets", [["norm.linear", "norm1.linear", "to_q"], "all-linear"])
def test_an_adapter_on_modulation_is_trained_and_loaded(targets, tmp_path):
    pipe = tiny("flux")
    ecodiff.prune(pipe, {s.name: torch.arange(s.units) % 2 == 0 for s in discover(pipe)})
    before = z0(pipe, "flux")
    denoiser = pipe.transformer
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    denoiser.add_adapter(config)
    tuned = z0(pipe, "flux")
    assert (tuned - before).abs().max() > 1e-4
    loss = denoise_once(denoiser)
    loss.backward()
    grads = {name: p.grad for name, p in denoiser.named_parameters() if p.requires_grad}
    assert any("norm.linear.rows.lora_B" in name for name in grads)
    assert all(grad is not None for grad in grads.values())
    denoiser.save_lora_adapter(tmp_path)
    denoiser.unload_lora()
    close(z0(pipe, "flux"), before)
    denoiser.load_lora_adapter(tmp_path, prefix=None)
    close(z0(pipe, "flux"), tuned)


def denoise_once(denoiser):
    width = denoiser.config.in_channels
    text, pooled = denoiser.config.joint_attention_dim, denoiser.config.pooled_projection_dim
    output = denoiser(
        torch.randn(1, 4, width),
        torch.randn(1, 3, text),
        torch.randn(1, pooled),
        torch.tensor([0.5]),
        img_ids=torch.zeros(4, 3),
        txt_ids=torch.zeros(3, 3),
    )
    return output.sample.square().mean()


def test_peft_alone_adapts_all_linears():
    denoiser = pruned("flux").transformer
    adapted = get_peft_model(denoiser, LoraConfig(r=2, target_modules="all-linear"))
    denoise_once(adapted.base_model.model).backward()
    merged = adapted.merge_and_unload()
    assert isinstance(merged, Pruned)


def test_a_controlnet_guides_a_pruned_unet():
    pipe = pruned("sdxl")
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(
        tiny("sdxl").unet, conditioning_embedding_out_channels=(4, 4, 4)
    )
    for parameter in control.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    parts = {**pipe.components, "controlnet": control}
    guided = StableDiffusionXLControlNetPipeline(**parts)
    guided.set_progress_bar_config(disable=True)
    call = {**CALLS["sdxl"], "image": Image.new("RGB", (64, 64), "red"), "output_type": "latent"}
    drawn = guided("a red square", generator=torch.Generator().manual_seed(0), **call).images
    off = guided(
        "a red square",
        generator=torch.Generator().manual_seed(0),
        controlnet_conditioning_scale=0.0,
        **call,
    ).images
    assert drawn.isfinite().all() and not torch.equal(drawn, off)


def ip_adapter(unet):
    """Random weights of an IP-Adapter for a dense U-Net, in the layout of its files."""
    width, texts = 8, unet.config.cross_attention_dim
    random = torch.Generator().manual_seed(11)
    layers, number = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            inner = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for part in ("k", "v"):
                value = torch.randn(inner, texts, generator=random) / texts**0.5
                layers[f"{number}.to_{part}_ip.weight"] = value
            number += 2
    image = {
        "proj.weight": torch.randn(4 * texts, width, generator=random),
        "proj.bias": torch.zeros(4 * texts),
        "norm.weight": torch.ones(texts),
        "norm.bias": torch.zeros(texts),
    }
    return {"image_proj": image, "ip_adapter": layers}


def with_image(pipe):
    image = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(2))
    embeds = [torch.cat([torch.zeros_like(image), image])]
    call = {**CALLS["sdxl"], "output_type": "latent", "ip_adapter_image_embeds": embeds}
    return pipe("a red square", generator=torch.Generator().manual_seed(0), **call).images


def test_an_ip_adapter_draws_as_it_does_under_the_mask():
    dense = tiny("sdxl")
    structures = discover(dense)
    kept = {
        s.name: [torch.arange(s.units) < 0, torch.arange(s.units) == 1][i % 2]
        for i, s in enumerate(s for s in structures if s.kind == "heads" and ".attn2." in s.name)
    }
    adapter, pipe = ip_adapter(dense.unet), tiny("sdxl")
    ecodiff.prune(pipe, kept)
    for one in (dense, pipe):
        one.unet._load_ip_adapter_weights([adapter])
    gates = Gates(structures)
    gates.set(kept)
    with gates.attached(dense.unet):
        masked = with_image(dense)
    close(with_image(pipe), masked)
    assert (masked - with_image(dense)).abs().max() > 1e-2


def test_an_ip_adapter_of_a_transformer_needs_all_heads():
    with pytest.raises(ValueError, match="IP-Adapters need all heads"):
        pruned("flux").transformer._load_ip_adapter_weights([{"image_proj": {}, "ip_adapter": {}}])
