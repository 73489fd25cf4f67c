"""How results came about: the manifest beside each, and the way back from a number to the prompts.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ecodiff.runtime.artifacts import SNAKEMAKES, manifest_of, write_json
from ecodiff.runtime.code import code_hash, git_commit
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.reading import read_text

# Every library that shapes a number, as an index names it.
LIBRARIES = (
    *("ecodiff", "torch", "diffusers", "transformers", "tokenizers", "sentencepiece", "ftfy"),
    *("accelerate", "safetensors", "peft", "torchao", "numpy", "pillow", "pandas", "pyarrow"),
    *("scipy", "torchvision", "torchmetrics", "torch-fidelity", "open_clip_torch", "matplotlib"),
)
BLOCK, BLOCKS = 2**20, 16  # bytes that are read of a larger file: blocks, evenly spread


@dataclass(frozen=True)
class Begun:
    """What is known when a stage begins: the inputs as they are now, and the time.

    Attributes:
        stage: the module that does the work.
        inputs: path or name -> `digest`.
        time: UTC.
    """

    stage: str
    inputs: Mapping[str, str | None]
    time: datetime

    @cached_property
    def _made_by(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "inputs": dict(self.inputs),
            "code": code_hash(self.stage),
            "versions": {"python": platform.python_version(), **_versions()},
        }

    def id(self, settings: Mapping[str, Any]) -> str:
        """A hash of all that shapes the result: stage, settings, inputs, code, versions, device."""
        made_of = {**self._made_by, "settings": settings, "device": device()}
        text = json.dumps(made_of, sort_keys=True, default=str, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def write_manifest(self, output: str | Path, settings: Mapping[str, Any]) -> None:
        """Writes `<output>.manifest.json`, which says how an output came about.

        Args:
            settings: whatever the stage was asked for: seeds, settings, resolved.
        """
        commit, now = git_commit(), datetime.now(UTC)
        manifest = {
            "id": self.id(settings),
            **self._made_by,
            "commit": commit and commit.removesuffix("+"),
            "edited": commit and commit.endswith("+"),  # whether files differed from the commit
            "settings": dict(settings),
            "device": device(),
            "began": self.time.isoformat(timespec="seconds"),
            "seconds": round((now - self.time).total_seconds(), 1),
            "output": content(Path(output)),
        }
        write_json(manifest_of(Path(output)), manifest)


def begin(stage: str, inputs: Iterable[str | Path]) -> Begun:
    """Note what a stage begins with. A run's config is no input: settings are noted as they were
    read of it."""
    paths = [str(path) for path in inputs if Path(path).suffix not in (".yaml", ".yml")]
    return Begun(stage, {path: digest(path) for path in paths}, datetime.now(UTC))


def digest(path: str) -> str | None:
    """Which thing an input is: the id of its manifest where it has one, else a hash of its bytes.

    So ids chain, and times that results hold don't count. A model of the hub is its commit; None
    where nothing is known of it.
    """
    place = Path(path)
    found = read_manifest(place)
    if found is not None:
        return found["id"]
    return content(place) if place.exists() else _hub_commit(path)


def content(path: Path) -> str:
    """A hash of a file's size and bytes, or of all files of a folder.

    Of files above 16 MB sixteen blocks are read, evenly spread: enough to tell other weights.
    """
    if path.is_dir():
        files = sorted(one for one in path.rglob("*") if one.is_file() and one.name != SNAKEMAKES)
        lines = [f"{file.relative_to(path)} {content(file)}" for file in files]
        return _hashed("\n".join(lines).encode())
    size, found = path.stat().st_size, hashlib.sha256()
    found.update(str(size).encode())
    with path.open("rb") as file:
        if size <= BLOCK * BLOCKS:
            found.update(file.read())
        else:
            for number in range(BLOCKS):
                file.seek(number * (size - BLOCK) // (BLOCKS - 1))
                found.update(file.read(BLOCK))
    return found.hexdigest()[:16]


def read_manifest(output: Path) -> dict[str, Any] | None:
    """The manifest of an output; None where there is none, or none that this version wrote."""
    path = manifest_of(output)
    if not path.is_file():
        return None
    try:
        found = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    return found if isinstance(found, dict) and {"id", "inputs"} <= found.keys() else None


def explain(path: Path, _depth: int = 0, _told: set[str] | None = None) -> list[str]:
    """Where a file comes from, a line each step back, to the prompts and models.

    Raises:
        UserError: there is no such file, or none that this version of ecodiff wrote.
    """
    told = set() if _told is None else _told
    indent = "  " * _depth
    owner = next((one for one in (path, *path.parents) if read_manifest(one) is not None), None)
    if owner is None:
        if _depth:
            return [f"{indent}{path}"]
        reason = "there is no such file" if not path.exists() else "has no manifest of ecodiff"
        raise UserError(f"{path}: {reason}, beside it or beside a folder that it lies in")
    found = read_manifest(owner) or {}
    name = str(owner) if owner == path else f"{path}, of {owner}"
    if str(owner) in told:
        return [f"{indent}{name} (above)"]
    told.add(str(owner))
    edited = " with edits" if found["edited"] else ""
    commit = f"commit {found['commit'][:12]}{edited}" if found["commit"] else "no commit"
    torch = found["versions"].get("torch")
    lines = [
        f"{indent}{name}",
        f"{indent}  by {found['stage']}, {found['began']}, {found['seconds']} s, {found['device']};"
        f" id {found['id']}, code {found['code']}, {commit}, torch {torch}",
    ]
    if not owner.exists():
        lines.append(f"{indent}  IT IS NOT THERE ANY MORE")
    elif content(owner) != found["output"]:
        lines.append(f"{indent}  IT HAS CHANGED SINCE IT WAS WRITTEN")
    if settings := _short(found["settings"]):
        lines.append(f"{indent}  settings: {settings}")
    for place, was in found["inputs"].items():
        below = explain(Path(place), _depth + 1, told)
        if was is not None and digest(place) != was:
            below[0] += " (HAS CHANGED SINCE, OR IS GONE)"
        lines += below
    return lines


def _short(settings: Mapping[str, Any]) -> str:
    """Settings in a line: those that say something."""
    said = {key: value for key, value in settings.items() if value not in (None, [], {}, "")}
    text = json.dumps(said, default=str)
    return text[1:-1] if len(text) < 400 else f"{text[1:390]} ..."


def device() -> str:
    """The GPU when a stage uses one, else the kind of processor."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _hub_commit(name: str) -> str | None:
    """The commit of a hub model's files that lie here."""
    from huggingface_hub import try_to_load_from_cache

    try:
        file = try_to_load_from_cache(name, "model_index.json")
    except ValueError:  # no name of the hub
        return None
    return Path(file).parent.name if isinstance(file, str) else None


def _hashed(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
