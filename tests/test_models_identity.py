"""Which model a thing is of: the same in any dtype, another after any training."""

import copy
import json

import pytest
import torch
from imports import loaded_by
from safetensors.numpy import save_file
from tiny import CALLS, tiny

import ecodiff
from ecodiff.config.sections import RetrainSettings
from ecodiff.models.identity import (
    LATENTS,
    OLD,
    Origin,
    packed,
    read_origin,
    same_denoiser,
    same_model,
)
from ecodiff.models.loading import load_pipeline
from ecodiff.models.pipelines import check_dense, dense_fingerprint, fingerprint
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.retrain.train import retrain
from ecodiff.retrain.trajectory import record
from ecodiff.runtime.errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def halved(pipe):
    ecodiff.prune(pipe, {s.name: torch.arange(s.units) % 2 == 0 for s in discover(pipe)})
    return pipe


@pytest.mark.parametrize("family", ["sdxl", "flux"])
@pytest.mark.parametrize("one", DTYPES, ids=str)
@pytest.mark.parametrize("other", DTYPES, ids=str)
def test_the_dtype_makes_no_other_model(family, one, other):
    first, second = (fingerprint(tiny(family).to(dtype)) for dtype in (one, other))
    assert same_model(first, second)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_a_model_of_the_same_shapes_is_another(family):
    assert not same_model(fingerprint(tiny(family)), fingerprint(tiny(family, seed=1)))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_least_training_makes_another_model(kind, tmp_path):
    pipe = tiny("flux")
    record(pipe, ["a", "b"], [1, 2], CALLS["flux"], 1, tmp_path)
    pipe = halved(pipe)
    before = fingerprint(pipe)
    # Two steps, as the first leaves one of the two factors of LoRA at zero.
    rank = {"rank": 2} if kind == "lora" else {}
    settings = RetrainSettings(kind=kind, **rank, lr=1e-4, steps=2, batch=2, warmup=0)
    retrain(pipe, [tmp_path], settings)
    assert not same_model(before, fingerprint(pipe))
    assert not same_model(before, fingerprint(pipe.to(torch.bfloat16)))


def test_another_schedule_makes_another_model():
    pipe = tiny("flux")
    before = fingerprint(pipe)
    pipe.scheduler.register_to_config(shift=2.0)
    assert not same_model(before, fingerprint(pipe))
    assert same_denoiser(before, fingerprint(pipe))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_keep_a_model_and_what_it_was_pruned_from(dtype, tmp_path):
    dense = fingerprint(tiny("flux"))
    pipe = halved(tiny("flux"))
    ecodiff.save(pipe, tmp_path / "pruned")
    loaded = load_pipeline(tmp_path / "pruned", dtype=dtype)
    assert same_model(fingerprint(loaded), fingerprint(pipe))
    assert not same_model(fingerprint(loaded), dense)
    assert dense_fingerprint(loaded) == dense


def test_a_model_pruned_by_an_older_version_is_refused():
    pipe = halved(tiny("flux"))
    denoiser = denoiser_of(pipe)
    record = {key: value for key, value in denoiser.config["pruned"].items() if key != "dense"}
    denoiser.register_to_config(pruned=record)
    with pytest.raises(UserError, match="older ecodiff"):
        dense_fingerprint(pipe)


def test_a_dense_model_is_known_by_what_was_pruned_from_it():
    dense, pruned = tiny("flux"), halved(tiny("flux"))
    check_dense(pruned, dense)
    check_dense(pruned, copy.deepcopy(dense).to(torch.bfloat16))
    with pytest.raises(UserError, match="pruned from another model"):
        check_dense(pruned, tiny("flux", seed=1))
    with pytest.raises(UserError, match="another family"):
        check_dense(pruned, tiny("sdxl"))
    with pytest.raises(UserError, match="is a pruned model"):
        check_dense(pruned, pruned)


def test_weights_are_rounded_and_not_cut_off():
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    rounded = weights.bfloat16().float().numpy()
    assert packed("a", "b", weights.numpy()) == packed("a", "b", rounded)


@pytest.mark.parametrize("text", [None, "{", "{}", '"x"'])
def test_a_shard_of_an_older_version_is_refused(tmp_path, text):
    metadata = None if text is None else {"ecodiff": text}
    save_file({"index": torch.arange(2).numpy()}, tmp_path / LATENTS, metadata=metadata)
    with pytest.raises(UserError, match=f"{LATENTS}: {OLD}"):
        read_origin(tmp_path)


def test_an_origin_survives_its_file(tmp_path):
    origin = Origin("a::", "b::", {"height": 64}, ["a ring", 'a "box"'], [3, 2**60])
    metadata = origin.metadata()
    json.loads(metadata["ecodiff"])
    save_file({"index": torch.tensor([7, 5]).numpy()}, tmp_path / LATENTS, metadata=metadata)
    assert read_origin(tmp_path) == ([7, 5], origin)


def test_identity_needs_no_torch():
    assert not {"torch", "diffusers"} & loaded_by("ecodiff.models.identity")
