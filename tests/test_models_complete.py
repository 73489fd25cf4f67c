"""A pipeline loads whole or not at all: one line names the file or the tensors."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import CALLS, tiny

import ecodiff
from ecodiff.models import loading
from ecodiff.runtime.errors import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "model"
    tiny("sdxl").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"


def refuses(folder, message, **options):
    with pytest.raises(UserError, match=message) as caught:
        loading.load_pipeline(folder, **options)
    assert "\n" not in str(caught.value)


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("device_map", [None, "cpu"])
def test_a_layer_without_weights_is_refused(folder, device_map):
    edit(folder / "text_encoder/config.json", num_hidden_layers=4)
    layer = r"text_encoder: config.json and weights disagree: missing tensors: .*layers\.3\."
    refuses(folder, layer, device_map=device_map)


def test_weights_without_a_layer_are_refused(folder):
    edit(folder / "text_encoder_2/config.json", num_hidden_layers=1)
    refuses(folder, r"text_encoder_2: .* disagree: unexpected tensors: .*layers\.1\.")


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("text_encoder", {"intermediate_size": 40}, "tensors of another shape: .*fc1"),
        (
            "vae",
            {"latent_channels": 7},
            "vae: .* disagree: .* another shape: decoder.conv_in",
        ),
        ("vae", {"layers_per_block": 3}, "vae: .* disagree: missing tensors: decoder"),
        ("vae", {"down_block_types": ["NoBlock"]}, "vae: .* disagree: .*NoBlock"),
        ("unet", {"in_channels": 5}, "unet: .* disagree: .*conv_in.weight"),
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_refused(folder, part, values, message):
    edit(folder / part / "config.json", **values)
    refuses(folder, message)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("family", ["sdxl", "flux", "sana"])
def test_a_tokenizer_without_a_file_is_refused(family, name, tmp_path):
    ecodiff.save(tiny(family), tmp_path / "model")
    part = "tokenizer" if family == "sana" else "tokenizer_2"
    (tmp_path / "model" / part / name).unlink()
    refuses(tmp_path / "model", rf"{part}/{name}: missing")


def test_words_in_several_files_are_a_tokenizer_too(folder, whole):
    words = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]
    (folder / "tokenizer/tokenizer.json").unlink()
    (folder / "tokenizer/vocab.json").write_text(json.dumps(words["vocab"]))
    refuses(folder, "tokenizer.json: missing, and so is merges.txt")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in words["merges"])])
    (folder / "tokenizer/merges.txt").write_text(merges)
    ids = [loading.load_pipeline(f).tokenizer("a red ring").input_ids for f in (folder, whole)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("content", ['{"version": ', '{"version": "1.0"}', "[]"])
def test_a_broken_tokenizer_is_named(folder, content):
    (folder / "tokenizer_2/tokenizer.json").write_text(content)
    refuses(folder, r"tokenizer_2/tokenizer.json: not ")


@pytest.mark.parametrize("part", ["vae", "scheduler", "tokenizer_2"])
def test_a_missing_part_is_named(folder, part):
    shutil.rmtree(folder / part)
    refuses(folder, f"{part}: missing, but model_index.json names it")


def test_what_is_left_out_need_not_be_there(folder):
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(folder / part)
    assert loading.load_pipeline(folder, encoders=False).text_encoder is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "NoPipeline"}, "_class_name: NoPipeline is not a pipeline of diffusers"),
        ({"_class_name": ["code", "Pipeline"]}, "is not a pipeline of diffusers"),
        ({"vae": ["os", "path"]}, "vae: os.path is unknown to diffusers"),
        ({"vae": ["diffusers", "NoVAE"]}, "vae: diffusers.NoVAE is unknown to diffusers"),
        ({"unet": [None, None]}, "no unet or transformer"),
    ],
)
def test_an_index_of_unknown_classes_is_refused(folder, values, message):
    edit(folder / "model_index.json", **values)
    refuses(folder, rf"model_index.json: .*{message}" if "no unet" not in message else message)


def test_a_folder_without_an_index_is_refused(folder):
    (folder / "model_index.json").unlink()
    refuses(folder, "model_index.json: missing")


@pytest.mark.parametrize("size", ["5GB", "100KB"])
def test_weights_of_a_variant_name_the_key(size, tmp_path):
    tiny("sdxl").save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    refuses(tmp_path, "holds only weights of variant fp16; set load.variant")
    assert loading.load_pipeline(tmp_path, variant="fp16").unet is not None
    refuses(tmp_path, "holds only weights of variant fp16", variant="bf16")
    shard = sorted((tmp_path / "unet").glob("*.safetensors"))[0]
    shard.unlink()
    refuses(tmp_path, "unet.*(missing, but|no weights)", variant="fp16")


def test_a_folder_of_ours_needs_no_variant(tmp_path):
    ecodiff.save(tiny("flux"), tmp_path / "model")
    pipe = loading.load_pipeline(tmp_path / "model", variant="fp16", revision="abc")
    assert pipe.transformer is not None


@pytest.mark.parametrize("family", CALLS)
def test_what_is_whole_is_left_alone(family, tmp_path):
    tiny(family).save_pretrained(tmp_path)
    loading.load_pipeline(tmp_path)


def test_text_encoders_may_be_saved_with_more_than_is_used(folder):
    file = folder / "text_encoder/model.safetensors"
    with safe_open(file, framework="pt") as weights:
        state = {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118
    state |= {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    state |= {"vision_model.embeddings.weight": torch.ones(1), "logit_scale": torch.ones(1)}
    save_file(state, file, metadata={"format": "pt"})
    loading.load_pipeline(folder)
