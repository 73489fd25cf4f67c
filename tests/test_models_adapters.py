"""Adapters of the dense model on a pruned one draw as the adapter and the mask do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import tiny, z0
from torch import nn

import ecodiff
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.runtime.errors import UserError
from ecodiff.trajectory.gates import Gates

NAMES = {"sdxl": "unet", "flux": "transformer", "sd3": "transformer"}
FILE = "pytorch_lora_weights.safetensors"


def some_units(pipe):
    """None, one, half or two thirds of the units, by turns."""
    kept = {}
    for i, s in enumerate(discover(pipe)):
        units = torch.arange(s.units)
        kept[s.name] = [units < 0, units == 1, units % 2 == 0, units % 3 > 0][i % 4]
    return kept


def pruned(family):
    pipe = tiny(family)
    ecodiff.prune(pipe, some_units(pipe))
    return pipe


@contextmanager
def masked(family) -> Iterator:
    """A dense pipeline with the mask as gates."""
    pipe = tiny(family)
    gates, kept = Gates(discover(pipe)), some_units(pipe)
    gates.set(kept)
    yield pipe, lambda: gates.attached(denoiser_of(pipe))


def linears(denoiser):
    return [name for name, part in denoiser.named_modules() if isinstance(part, nn.Linear)]


def trained(pipe, family, folder, **config):
    """Save a random adapter of a pipeline's denoiser, as training scripts do, and take it off."""
    denoiser = denoiser_of(pipe)
    torch.manual_seed(5)
    given = {"r": 2, "lora_alpha": 3, "target_modules": linears(denoiser)}
    denoiser.add_adapter(LoraConfig(**{**given, **config}, init_lora_weights=False))
    state = get_peft_model_state_dict(denoiser)
    name = NAMES[family]
    metadata = _collate_lora_metadata({name: denoiser})
    type(pipe).save_lora_weights(folder, **{f"{name}_lora_layers": state}, **metadata)
    drawn = z0(pipe, family)
    denoiser.delete_adapters("default")
    return drawn


def as_saved(family, folder):
    trained(tiny(family), family, folder, rank_pattern={"norm.linear": 3, "to_q": 1})


def without_metadata(family, folder):
    as_saved(family, folder)
    save_file(load_file(folder / FILE), folder / FILE)


def with_alphas(family, folder):
    """The layout of ai-toolkit: a scale beside each layer."""
    as_saved(family, folder)
    state = load_file(folder / FILE)
    layers = {key.partition(".lora_")[0] for key in state}
    scales = {f"{layer}.alpha": torch.tensor(i % 3 + 1.0) for i, layer in enumerate(sorted(layers))}
    save_file({**state, **scales}, folder / FILE)


def of_kohya(family, folder):
    """What sd-scripts writes: other names, and FLUX's q, k and v in one."""
    folder.mkdir()
    denoiser = denoiser_of(tiny(family))
    random = torch.Generator().manual_seed(7)
    state = {}

    def add(key, rows, columns):
        state[f"{key}.lora_down.weight"] = torch.randn(2, columns, generator=random) / 3
        state[f"{key}.lora_up.weight"] = torch.randn(rows, 2, generator=random) / 3
        state[f"{key}.alpha"] = torch.tensor(1.0)

    if family == "sdxl":
        for name in linears(denoiser):
            if "transformer_blocks" in name:
                part = denoiser.get_submodule(name)
                add(f"lora_unet_{name.replace('.', '_')}", part.out_features, part.in_features)
    else:
        width, double = denoiser.inner_dim, "lora_unet_double_blocks_0"
        for stream in ("img", "txt"):
            add(f"{double}_{stream}_attn_qkv", 3 * width, width)
            add(f"{double}_{stream}_attn_proj", width, width)
            add(f"{double}_{stream}_mlp_0", 4 * width, width)
            add(f"{double}_{stream}_mlp_2", width, 4 * width)
            add(f"{double}_{stream}_mod_lin", 6 * width, width)
        for i in range(2):
            add(f"lora_unet_single_blocks_{i}_linear2", width, 5 * width)
            add(f"lora_unet_single_blocks_{i}_modulation_lin", 3 * width, width)
    save_file(state, folder / FILE)


@pytest.mark.parametrize(
    ("family", "make"),
    [
        *[("flux", make) for make in (as_saved, without_metadata, with_alphas, of_kohya)],
        ("sdxl", as_saved),
        ("sdxl", of_kohya),
        ("sd3", as_saved),
    ],
)
def test_an_adapter_of_the_dense_model_draws_as_it_does_under_the_mask(family, make, tmp_path):
    make(family, tmp_path / "lora")
    with masked(family) as (dense, attached):
        dense.load_lora_weights(tmp_path / "lora")
        with attached():
            expected = z0(dense, family)
    pipe = pruned(family)
    before = z0(pipe, family)
    pipe.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(z0(pipe, family), expected, rtol=0, atol=1e-4)
    assert (expected - before).abs().max() > 1e-2
    pipe.fuse_lora()
    torch.testing.assert_close(z0(pipe, family), expected, rtol=0, atol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(z0(pipe, family), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_an_adapter_of_the_pruned_model_loads_as_it_is(family, tmp_path):
    pipe = pruned(family)
    expected = trained(pipe, family, tmp_path)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(z0(pipe, family), expected)


def test_a_saved_model_knows_its_units(tmp_path):
    ecodiff.save(pruned("flux"), tmp_path / "model")
    as_saved("flux", tmp_path / "lora")
    first, second = pruned("flux"), ecodiff.load(tmp_path / "model")
    for pipe in (first, second):
        pipe.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(z0(second, "flux"), z0(first, "flux"), rtol=0, atol=1e-5)


def test_the_rows_and_columns_are_those_of_the_units_that_stay():
    pipe = tiny("flux")
    name = "transformer_blocks.0.ff"
    units = next(s.units for s in discover(pipe) if s.name == f"{name}.neurons")
    stays = torch.arange(units) % 5 == 2
    ecodiff.prune(pipe, {f"{name}.neurons": stays})
    rows, columns = torch.randn(units, 2), torch.randn(2, units)
    fitted = pipe.transformer.fit_lora(
        {
            f"{name}.net.0.proj.lora_A.weight": torch.randn(2, 48),
            f"{name}.net.0.proj.lora_B.weight": rows,
            f"{name}.net.0.proj.lora_B.bias": rows[:, 0],
            f"{name}.net.2.lora_A.weight": columns,
            f"{name}.net.2.lora_B.weight": torch.randn(48, 2),
        }
    )
    assert torch.equal(fitted[f"{name}.net.0.proj.lora_B.weight"], rows[2::5])
    assert torch.equal(fitted[f"{name}.net.0.proj.lora_B.bias"], rows[2::5, 0])
    assert torch.equal(fitted[f"{name}.net.2.lora_A.weight"], columns[:, 2::5])


QUERY, OUT = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2"


def plain(layer, rows, columns):
    return {
        f"transformer.{layer}.lora_A.weight": torch.randn(2, columns),
        f"transformer.{layer}.lora_B.weight": torch.randn(rows, 2),
    }


def of_kind(layer, **tensors):
    return {f"transformer.{layer}.{part}": torch.ones(shape) for part, shape in tensors.items()}


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (plain(QUERY, 48, 32), f"{QUERY}.lora_A.weight is for 32 columns; the layer has 48"),
        (plain(QUERY, 32, 48), r"for 32 rows; the layer has 24 \(of the dense model 48\)"),
        (plain("x_embedder", 48, 99), "x_embedder.lora_A.weight is for 99 columns"),
        (plain("blocks.0.to_q", 48, 48), "has no layer blocks.0.to_q, nor others"),
        (
            {**plain(QUERY, 48, 48), **plain("transformer_blocks.0.attn.to_k", 24, 48)},
            "some layers are of the dense model's sizes, others of this one's",
        ),
        (
            {**plain(OUT, 48, 192), **of_kind(OUT, lora_magnitude_vector=48)},
            "lora_magnitude_vector can't be cut",
        ),
        (of_kind(QUERY, lokr_w1=(2, 2), lokr_w2=(24, 24)), "lokr_w1 can't be cut, only plain LoRA"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(adapter, message):
    pipe = tiny("flux")
    ecodiff.prune(pipe, {s.name: torch.arange(s.units) % 2 == 0 for s in discover(pipe)})
    before, modules = z0(pipe, "flux"), [*pipe.transformer.named_modules()]
    is_lora = any("lora_A" in key for key in adapter)
    load = pipe.load_lora_weights if is_lora else pipe.transformer.load_lora_adapter
    with pytest.raises(ValueError, match=message):
        load(dict(adapter))
    assert [*pipe.transformer.named_modules()] == modules
    assert torch.equal(z0(pipe, "flux"), before)


def test_a_folder_that_does_not_know_its_units_refuses_adapters(tmp_path):
    as_saved("flux", tmp_path)
    pipe = pruned("flux")
    record = {**pipe.transformer.config["pruned"]}
    del record["kept"]
    pipe.transformer.register_to_config(pruned=record)
    with pytest.raises(ValueError, match="doesn't tell which units stayed; prune again"):
        pipe.load_lora_weights(tmp_path)


@pytest.mark.parametrize(
    ("family", "make"),
    [("flux", as_saved), ("flux", with_alphas), ("flux", of_kohya), ("sdxl", of_kohya)],
)
def test_a_fitted_file_draws_what_the_adapter_does(family, make, tmp_path):
    make(family, tmp_path / "lora")
    pipe = pruned(family)
    before = z0(pipe, family)
    save_file(ecodiff.fit_lora(tmp_path / "lora", pipe), tmp_path / "fitted.safetensors")
    assert torch.equal(z0(pipe, family), before)
    pipe.load_lora_weights(tmp_path / "lora")
    expected = z0(pipe, family)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "fitted.safetensors")
    torch.testing.assert_close(z0(pipe, family), expected, rtol=0, atol=1e-4)


def test_what_cannot_be_fitted_is_one_line(tmp_path):
    pipe = pruned("flux")
    with pytest.raises(UserError, match=r"fit_lora: adapter: .* is of another model"):
        ecodiff.fit_lora(plain(QUERY, 48, 32), pipe)
    assert not pipe.get_list_adapters()
    with pytest.raises(UserError, match="is not pruned; its adapters fit as they are"):
        ecodiff.fit_lora(plain(QUERY, 48, 48), tiny("flux"))
    with pytest.raises(UserError, match="nowhere"):
        ecodiff.fit_lora(tmp_path / "nowhere", pipe)
    pipe.load_lora_weights(plain("x_embedder", 48, 16))
    with pytest.raises(UserError, match="the pipeline has adapters"):
        ecodiff.fit_lora(plain(QUERY, 48, 48), pipe)


@pytest.mark.slow
def test_adapters_fit_where_ecodiff_is_not_installed(tmp_path):
    pipe = pruned("flux")
    ecodiff.save(pipe, tmp_path / "model")
    as_saved("flux", tmp_path / "lora")
    pipe.load_lora_weights(tmp_path / "lora")
    script = (
        "import sys, torch; sys.modules['ecodiff'] = None\n"  # as if it were not installed
        "from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained('model', trust_remote_code=True)\n"
        "pipe.load_lora_weights('lora')\n"
        "pipe.fuse_lora()\n"
        "torch.save({k.replace('.base_layer', ''): v for k, v in"
        " pipe.transformer.state_dict().items() if 'lora' not in k}, 'fused.pt')\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=environment)
    fused = torch.load(tmp_path / "fused.pt", weights_only=True)
    pipe.fuse_lora()
    for name, value in pipe.transformer.state_dict().items():
        if "lora" not in name:
            torch.testing.assert_close(fused[name.replace(".base_layer", "")], value)
