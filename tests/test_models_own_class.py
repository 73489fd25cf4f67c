"""A pruned denoiser is loaded alone, by `AutoModel` or its dense class, and with our own class."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from tiny import tiny, z0

import ecodiff
from ecodiff.models.structures import denoiser_of, discover

NAMES = {"sdxl": "unet", "flux": "transformer"}


def pruned(family):
    pipe = tiny(family)
    ecodiff.prune(pipe, {s.name: torch.arange(s.units) % 3 > 0 for s in discover(pipe)})
    return pipe


def close(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", NAMES)
def test_a_denoiser_alone_is_loaded_by_auto_model(family, tmp_path):
    pipe = pruned(family)
    ecodiff.save(pipe, tmp_path)
    name = NAMES[family]
    (tmp_path / name / "ecodiff.py").write_text("raise RuntimeError('it was run')")
    options = {"subfolder": name}
    for place, given in (
        (tmp_path, options),
        (tmp_path, {**options, "trust_remote_code": True}),
        (tmp_path / name, {"trust_remote_code": True}),
    ):
        part = AutoModel.from_pretrained(str(place), **given)
        assert type(part) is type(denoiser_of(pipe))
        setattr(pipe, name, part)
        close(z0(pipe, family), z0(pruned(family), family))


@pytest.mark.slow
def test_auto_model_needs_no_ecodiff(tmp_path):
    pipe = pruned("sdxl")
    ecodiff.save(pipe, tmp_path / "model")
    script = (
        "import sys; sys.modules['ecodiff'] = None\n"
        "from diffusers import AutoModel\n"
        "for place in ({}, {'subfolder': 'unet'}):\n"
        "    folder = 'model' if place else 'model/unet'\n"
        "    unet = AutoModel.from_pretrained(folder, trust_remote_code=True, **place)\n"
        "    print(type(unet).__name__, unet.num_parameters())\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    expected = ["PrunedUNet2DConditionModel", str(pipe.unet.num_parameters())]
    assert done.stdout.split() == 2 * expected


def test_the_other_parts_are_loaded_by_auto_model(tmp_path):
    pipe = pruned("sdxl")
    ecodiff.save(pipe, tmp_path)
    for trust in (False, True):
        part = AutoModel.from_pretrained(str(tmp_path), subfolder="vae", trust_remote_code=trust)
        assert type(part) is type(pipe.vae)


@pytest.mark.parametrize("family", NAMES)
def test_the_dense_class_loads_a_pruned_denoiser(family, tmp_path):
    pipe, dense = pruned(family), type(denoiser_of(tiny(family)))
    ecodiff.save(pipe, tmp_path)
    part = dense.from_pretrained(tmp_path, subfolder=NAMES[family])
    assert type(part) is type(denoiser_of(pipe))
    expected = z0(pipe, family)
    setattr(pipe, NAMES[family], part)
    close(z0(pipe, family), expected)


def test_pipelines_do_not_warn_of_what_auto_model_reads(tmp_path, caplog):
    ecodiff.save(pruned("flux"), tmp_path)
    with heard(caplog):
        DiffusionPipeline.from_pretrained(tmp_path)
    assert "auto_map" not in caplog.text and "differs" not in caplog.text


@pytest.mark.parametrize(
    "load",
    [
        ecodiff.load,
        DiffusionPipeline.from_pretrained,
        lambda folder: AutoModel.from_pretrained(str(folder), subfolder="transformer"),
    ],
    ids=["ecodiff", "pipeline", "auto_model"],
)
def test_a_class_file_that_was_changed_is_named_once(load, tmp_path, caplog):
    ecodiff.save(pruned("flux"), tmp_path)
    file = tmp_path / "transformer/ecodiff.py"
    file.write_text(file.read_text() + "# mine\n")
    with heard(caplog):
        load(tmp_path)
    said = [record.message for record in caplog.records if "ecodiff.py" in record.message]
    assert len(said) == 1
    assert said[0].startswith(f"{file} was edited, or saved by another version of ecodiff")
    assert said[0].endswith("its own code is not run")


@contextmanager
def heard(caplog):
    """Inside, what diffusers says is recorded."""
    library = logging.getLogger("diffusers")
    library.addHandler(caplog.handler)
    try:
        yield
    finally:
        library.removeHandler(caplog.handler)
