"""What people do with a pruned pipeline in diffusers: it behaves as any other."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline
from diffusers.pipelines import pipeline_utils
from diffusers.utils import hub_utils
from huggingface_hub import ModelCard
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from tiny import CALLS, tiny

import ecodiff
from ecodiff.models.pipelines import denoise, encode, starting_noise
from ecodiff.models.pruned import Pruned
from ecodiff.models.structures import count_parameters, denoiser_of
from ecodiff.runtime.errors import UserError

DOCS = Path(__file__).parents[1] / "docs"
FAMILIES = ("sdxl", "flux")
PROMPT = "a small red ring on navy"


def pruned(family):
    pipe = tiny(family)
    units = {s.name: torch.arange(s.units) % 2 == 0 for s in ecodiff.discover(pipe)}
    ecodiff.prune(pipe, units)
    return pipe


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A saved pruned pipeline; not to be changed."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    ecodiff.save(pruned(request.param), folder)
    return request.param, folder


@pytest.fixture
def loaded(folder):
    """The family and a freshly loaded pipeline."""
    family, path = folder
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return family, pipe


def z0(pipe, family):
    call = CALLS[family]
    return denoise(pipe, encode(pipe, [PROMPT], call), starting_noise(pipe, [3], call), call)


def test_to_another_dtype_moves_weights_and_keeps_indices(loaded):
    _, pipe = loaded
    pipe.to(torch.bfloat16)
    state = denoiser_of(pipe).state_dict()
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.bfloat16}
    assert {t.dtype for k, t in state.items() if k.endswith(".index")} <= {torch.int64}


def test_offloading_changes_no_picture(loaded):
    family, pipe = loaded
    before = z0(pipe, family)
    pipe.enable_model_cpu_offload(device="cpu")
    torch.testing.assert_close(z0(pipe, family), before)


@pytest.mark.parametrize("setting", ["slicing", "native", "compile"])
def test_ways_to_attend_and_compile_change_no_picture(loaded, setting):
    family, pipe = loaded
    before = z0(pipe, family)
    denoiser = denoiser_of(pipe)
    if setting == "compile":
        denoiser.compile(backend="eager")
    elif setting == "native":
        denoiser.set_attention_backend("native")
    elif family == "flux":
        pytest.skip("diffusers' FLUX processors know no slicing")
    else:
        pipe.enable_attention_slicing(1)
    torch.testing.assert_close(z0(pipe, family), before, rtol=1e-4, atol=1e-4)


def test_pictures_can_be_edited(loaded):
    family, pipe = loaded
    picture = Image.fromarray(np.full((64, 64, 3), 128, dtype=np.uint8))
    call = {k: v for k, v in CALLS[family].items() if k != "max_sequence_length"}
    for kind, extra in (
        (AutoPipelineForImage2Image, {}),
        (AutoPipelineForInpainting, {"mask_image": picture.convert("L")}),
    ):
        edit = kind.from_pipe(pipe)
        edit.set_progress_bar_config(disable=True)
        assert isinstance(denoiser_of(edit), Pruned)
        drawn = edit(PROMPT, image=picture, strength=0.7, **call, **extra).images[0]
        assert drawn.size == (64, 64)


def test_adapters_load_on_top(loaded, tmp_path):
    family, pipe = loaded
    torch.manual_seed(0)
    denoiser = denoiser_of(pipe)
    wanted = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q", "to_v"]}
    denoiser.add_adapter(LoraConfig(**wanted, init_lora_weights=False))
    tuned = z0(pipe, family)
    name = "unet" if family == "sdxl" else "transformer"
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(denoiser)}
    type(pipe).save_lora_weights(tmp_path, **layers)
    denoiser.delete_adapters("default")
    assert not torch.equal(z0(pipe, family), tuned)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(z0(pipe, family), tuned)


def test_a_denoiser_with_adapters_is_refused():
    dense = tiny("sdxl")
    dense.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UserError, match="adapters must be merged"):
        ecodiff.discover(dense)


def test_what_is_pushed_to_the_hub_is_what_was_saved(loaded, tmp_path, monkeypatch):
    family, pipe = loaded
    sent = tmp_path / "sent"
    repo = SimpleNamespace(repo_id="owner/name")
    monkeypatch.setattr(hub_utils, "create_repo", lambda *_, **__: repo)
    monkeypatch.setattr(pipeline_utils, "create_repo", lambda *_, **__: repo)
    monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *_, **__: ModelCard(""))

    def upload(folder_path, **_):
        shutil.copytree(folder_path, sent)

    monkeypatch.setattr(hub_utils, "upload_folder", upload)
    pipe.push_to_hub("owner/name")
    name = "unet" if family == "sdxl" else "transformer"
    assert (sent / name / "ecodiff.py").is_file()
    again = DiffusionPipeline.from_pretrained(sent)
    assert torch.equal(z0(again, family), z0(pipe, family))


@pytest.mark.slow
def test_the_scripts_of_the_docs_run(tmp_path):
    dense = tiny("sdxl")
    dense.save_pretrained(tmp_path / "dense")
    (tmp_path / "prompts.txt").write_text("a small red ring on navy\na large blue square on grey\n")
    run(tmp_path, "prune_your_own.py", "dense", "prompts.txt", "1", "small")
    without = {"PYTHONPATH": str(tmp_path / "none")}
    run(tmp_path, "load_with_diffusers.py", "small", "drawn.png", **without)
    assert Image.open(tmp_path / "drawn.png").size == (64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("toy", ["toy-sdxl", "toy-flux"])
def test_the_script_prunes_the_shipped_toys(toy, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a small red ring on navy\n")
    short = partial(ecodiff.learn_mask, settings={"iterations": 1})
    monkeypatch.setattr(ecodiff, "learn_mask", short)
    model, prompts, small = DOCS.parent / "resources/toys" / toy, "prompts.txt", tmp_path / "small"
    words = [str(word) for word in (model, tmp_path / prompts, 1, small)]
    monkeypatch.setattr(sys, "argv", ["prune_your_own.py", *words])
    runpy.run_path(DOCS / "prune_your_own.py")
    before, after = (
        count_parameters(denoiser_of(ecodiff.load(folder))) for folder in (model, small)
    )
    assert after == pytest.approx(0.8 * before, rel=0.01)


def run(folder, script, *words, **environment):
    home = {"HF_HOME": str(folder / "home")}
    done = subprocess.run(
        [sys.executable, DOCS / script, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, **home, **environment},
    )
    assert done.returncode == 0, done.stderr


def test_the_script_that_prunes_is_short():
    lines = (DOCS / "prune_your_own.py").read_text().split('"""')[2].splitlines()
    assert len([line for line in lines if line.strip()]) <= 10
