"""Loading: folders, single files and the hub, and what each failure tells the user to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from original import save_original
from tiny import CALLS, tiny_flux, tiny_sdxl
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import ecodiff
from ecodiff.models import loading, pipelines
from ecodiff.runtime.errors import UserError
from ecodiff.toys import flux, vae


def test_a_saved_pipeline_loads_back(tmp_path):
    pipe = tiny_sdxl()
    pipe.save_pretrained(tmp_path)
    loaded = loading.load_pipeline(str(tmp_path), dtype="bfloat16")
    assert loaded.unet.dtype == torch.bfloat16
    torch.testing.assert_close(
        loaded.unet.conv_in.weight, pipe.unet.conv_in.weight.to(torch.bfloat16)
    )


@pytest.mark.parametrize(
    "source", ["no-such-folder", "/no/folder", "./models/sdxl", "../sdxl", "~/sdxl", "mine/sdxl"]
)
def test_a_missing_folder_is_not_sought_on_the_hub(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda *_, **__: pytest.fail("sought"))
    with pytest.raises(UserError, match=f"source: {source} is neither a hub id"):
        loading.load_pipeline(source)


def test_truncated_weights_are_refused(tmp_path):
    tiny_flux().save_pretrained(tmp_path)
    weights = next((tmp_path / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="truncated"):
        loading.load_pipeline(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    tiny_flux().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(UserError, match="pickle"):
        loading.load_pipeline(tmp_path)


def test_a_quantised_base_is_refused_before_it_is_loaded(tmp_path):
    tiny_flux().save_pretrained(tmp_path)
    file = tmp_path / "transformer/config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "torchao"}}
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"is quantised \(torchao\), which is not read here"):
        loading.load_pipeline(tmp_path)


def test_a_broken_index_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({})[:1])
    with pytest.raises(UserError, match="JSON"):
        loading.load_pipeline(tmp_path)


def test_an_unknown_dtype_lists_the_known_ones():
    with pytest.raises(UserError, match="float32, bfloat16, float16"):
        loading.load_pipeline("owner/name", dtype="int8")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"device": "banana"}, "device: banana is not one of auto, cpu"),
        ({"device_map": "banana"}, "device_map: 'banana' is not one of balanced, "),
    ],
)
def test_an_unknown_place_lists_the_known_ones(options, line):
    with pytest.raises(UserError, match=line):
        loading.load_pipeline("owner/name", **options)


def answers(kind):
    """An error of the hub's client, without the response that it would come with."""
    return kind.__new__(kind, "no")


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (GatedRepoError, "is gated: accept its terms at .*owner/name, then run `hf auth login`"),
        (RepositoryNotFoundError, "is not on the hub, or private: check the name, or run"),
        (RevisionNotFoundError, "has no such revision"),
    ],
)
def test_what_the_hub_refuses_comes_with_what_helps(monkeypatch, kind, line):
    def refuse(*_, **__):
        try:
            raise answers(kind)
        except kind as error:
            raise OSError("Cannot load model") from error  # as diffusers does

    monkeypatch.setattr(DiffusionPipeline, "load_config", refuse)
    with pytest.raises(UserError, match=line) as caught:
        loading.load_pipeline("owner/name")
    assert "\n" not in str(caught.value)


def test_offline_names_the_command_that_fetches(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="`hf download owner/missing` online"):
        loading.load_pipeline("owner/missing")


def test_hub_options_reach_the_download(monkeypatch, tmp_path):
    asked = {}

    def fetch(source, **options):
        asked.update(options, source=source)
        tiny_sdxl().save_pretrained(tmp_path, variant="fp16")
        return tmp_path

    on_the_hub(monkeypatch, tiny_sdxl())
    monkeypatch.setattr(DiffusionPipeline, "download", fetch)
    pipe = loading.load_pipeline("owner/name", revision="abc", variant="fp16", encoders=False)
    wanted = {"source": "owner/name", "revision": "abc", "variant": "fp16"}
    left_out = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    assert asked == wanted | dict.fromkeys(left_out) | {"use_safetensors": True}
    assert pipe.text_encoder is None


def on_the_hub(monkeypatch, pipe):
    """As if the hub had this pipeline's model_index.json."""
    read = DiffusionPipeline.load_config
    index = {"_class_name": type(pipe).__name__}
    index |= {k: v for k, v in pipe.config.items() if isinstance(v, tuple)}
    index = json.loads(json.dumps(index))
    monkeypatch.setattr(
        DiffusionPipeline,
        "load_config",
        lambda source, **options: index if source == "owner/name" else read(source, **options),
    )


@pytest.mark.parametrize("make", [tiny_sdxl, tiny_flux])
def test_text_encoders_can_be_left_out(make, tmp_path):
    pipe, call = make(), CALLS["sdxl" if make is tiny_sdxl else "flux"]
    ecodiff.save(pipe, tmp_path / "model")
    bare = loading.load_pipeline(tmp_path / "model", encoders=False)
    assert not [n for n, part in bare.components.items() if n.startswith("text_") and part]
    embeds = pipelines.encode(pipe, ["a red square"], call)
    noise = pipelines.starting_noise(pipe, [1], call)
    z0 = [pipelines.denoise(p, embeds, noise, call) for p in (pipe, bare)]
    torch.testing.assert_close(*z0, rtol=0, atol=1e-5)


PEAK = """
import sys, threading
import torch, ecodiff
from diffusers import DiffusionPipeline

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])

read = ecodiff.load if sys.argv[3] == "ecodiff" else DiffusionPipeline.from_pretrained
read(sys.argv[2], dtype=torch.float32)  # a small one, for whatever loading imports
peak, done, before = [0], threading.Event(), anonymous()

def watch():
    while not done.wait(0.001):
        peak.append(anonymous())

thread = threading.Thread(target=watch)
thread.start()
pipe = read(sys.argv[1], dtype=torch.float32)
done.set()
thread.join()
weights = sum(p.nbytes for p in pipe.transformer.parameters())
print((max(peak) - before) / weights)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's accounts")
@pytest.mark.parametrize("reader", ["ecodiff", "diffusers"])
def test_loading_a_pruned_model_takes_no_more_than_its_weights(reader, tmp_path):
    pipe = flux.build(vae.build(), heads=24, double=2, single=2)
    kept = {s.name: torch.arange(s.units) % 5 > 0 for s in ecodiff.discover(pipe)}
    ecodiff.prune(pipe, kept)
    # Half precision on disk: the cast leaves nothing to the file's own pages.
    ecodiff.save(pipe.to(torch.float16), tmp_path / "model")
    ecodiff.save(tiny_flux(), tmp_path / "small")
    command = [sys.executable, "-c", PEAK, tmp_path / "model", tmp_path / "small", reader]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout.split()[-1]) < 1.1


def test_a_single_file_needs_the_config_of_its_pipeline(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(UserError, match="is a single file: set `config`"):
        loading.load_pipeline(file)


def test_a_single_file_is_the_pipeline_that_it_was_written_from(tmp_path):
    pipe = original_sdxl()
    pipe.save_pretrained(tmp_path / "config")
    save_original(pipe, tmp_path / "model.safetensors")
    for weights in (tmp_path / "config").rglob("*.safetensors"):
        weights.unlink()  # so that nothing but the single file can be where they come from
    read = loading.load_pipeline(tmp_path / "model.safetensors", config=str(tmp_path / "config"))
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        found, wanted = (getattr(one, name).state_dict() for one in (read, pipe))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def original_sdxl():
    """A tiny SDXL whose second text encoder is of another width, as in the real one."""
    torch.manual_seed(0)
    pipe = tiny_sdxl()
    config = pipe.text_encoder_2.config.to_dict()
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    pipe.text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**config))
    width = pipe.text_encoder.config.hidden_size + 32
    unet = {**pipe.unet.config, "cross_attention_dim": width}
    pipe.register_modules(unet=UNet2DConditionModel.from_config(unet))
    return pipe


def test_a_pickled_single_file_is_never_read(tmp_path):
    file = tmp_path / "model.ckpt"
    file.touch()
    with pytest.raises(UserError, match="pickles are never read"):
        loading.load_pipeline(file, config="owner/name")
