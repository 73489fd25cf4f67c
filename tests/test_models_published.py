"""A saved folder is published as it is, and read from the hub: a stand-in of it on this machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hub import REPOSITORY, hub
from tiny import tiny

import ecodiff

LOADS = f"""
import sys; sys.modules["ecodiff"] = None
from diffusers import AutoModel, DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("{REPOSITORY}", trust_remote_code=True)
part = AutoModel.from_pretrained("{REPOSITORY}", subfolder="transformer", trust_remote_code=True)
for found in (pipe.transformer, part):
    print(type(found).__name__, found.num_parameters())
pipe.push_to_hub("{REPOSITORY}")
"""


@pytest.mark.slow
def test_an_uploaded_folder_is_loaded_without_ecodiff(tmp_path):
    pipe, folder = tiny("flux"), tmp_path / "smaller"
    ecodiff.prune(pipe, {s.name: torch.arange(s.units) % 3 > 0 for s in ecodiff.discover(pipe)})
    ecodiff.save(pipe, folder)
    saved = {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }
    with hub() as there:
        environment = {**os.environ, **there.environment, "HF_HOME": str(tmp_path / "home")}

        def run(*command):
            done = subprocess.run(
                [sys.executable, *command], env=environment, capture_output=True, text=True
            )
            assert not done.returncode, done.stderr
            return done.stdout.split()

        run("-m", "huggingface_hub.cli.hf", "upload", REPOSITORY, str(folder))
        assert there.files == saved
        expected = ["PrunedFluxTransformer2DModel", str(pipe.transformer.num_parameters())]
        assert run("-c", LOADS) == 2 * expected
        # Where a repository has a card, `push_to_hub` keeps what it says.
        assert saved["README.md"].split(b"---")[2] in there.files["README.md"]
