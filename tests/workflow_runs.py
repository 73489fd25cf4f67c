"""Runs of the workflow in a folder of their own, as users start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ecodiff.runtime import forkserver

ROOT = Path(__file__).parents[1]
CALL = {"num_inference_steps": 2, "max_sequence_length": 16, "height": 64, "width": 64}


def start(
    folder: Path, *words: Any, root: Path = ROOT, python: Path = Path(sys.executable)
) -> subprocess.Popen[str]:
    """Start Snakemake with a folder as its working directory, by a Python of an environment."""
    command = [python, "-m", "snakemake", "--snakefile", root / "Snakefile"]
    command += ["--directory", folder, *words]
    path = f"{python.parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(root), "PATH": path}
    if root == ROOT and python == Path(sys.executable) and "--dry-run" not in words:
        environment[forkserver.SOCKET] = shared_forkserver()
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=folder,
    )


def snakemake(folder: Path, *words: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Snakemake until it ends; options as those of `start`."""
    started = start(folder, *words, **options)
    stdout, stderr = started.communicate()
    return subprocess.CompletedProcess(started.args, started.returncode, stdout, stderr)


@cache
def shared_forkserver() -> str:
    """One for all runs of this process, which then start in half the time."""
    return forkserver.start()


def bytes_of(file: Path) -> bytes:
    """A file's bytes; of safetensors with its header sorted, whose metadata come in any order."""
    data = file.read_bytes()
    if file.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]


def tiny_models(folder: Path) -> None:
    """A FLUX-shaped pipeline and a CLIP model of random weights, as `tiny` and `clip`."""
    from tiny import tiny_flux

    from ecodiff.toys import clip

    tiny_flux().save_pretrained(folder / "tiny")
    clip.save(clip.CLIP(**clip.CONFIG), folder / "clip")


def tiny_run(**changes: Any) -> dict[str, Any]:
    """The config of the smallest run: one variant of the tiny model, nothing learned or timed."""
    return {
        "run": "small",
        "models": {"tiny": {"source": "tiny", "call": CALL, "load": {"device": "cpu"}}},
        "variants": [{"method": "random", "sparsities": [0.2]}],
        "prompts": {
            "calibration": {"source": "shapeworld", "count": 4, "seed": 900},
            "evaluation": {"source": "shapeworld", "split": "held-out", "count": 4},
        },
        "mask": {"batch": 2},
        "evaluate": {
            "features": "clip",
            "clip_model": "local-dir:clip",
            "clip_pretrained": None,
            "efficiency": None,
            "mask_cost": None,
        },
        **changes,
    }


def run(
    folder: Path, config: dict[str, Any], *words: Any, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Write a config and run it."""
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return snakemake(folder, "--configfile", "run.yaml", "--cores", 2, *words, **options)
