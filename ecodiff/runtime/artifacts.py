"""What every stage leaves behind: whole files or none, and how they came about.

Imports no torch.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("ecodiff", "torch", "diffusers", "transformers", "peft", "open_clip_torch")
# How files are written and errors told changes no result; the values of settings reach a stage as
# parameters, which Snakemake compares by themselves.
SHAPE_NO_RESULT = ("ecodiff.config", "ecodiff.runtime.artifacts", "ecodiff.runtime.errors")


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A path to write a file or a folder at, which becomes `path` when the block succeeds.

    An existing file or folder at `path` is replaced; on an error it stays and nothing is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # On the same file system, or the last step would be a copy that can be cut short.
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield scratch / path.name
        if path.is_dir():
            os.replace(path, scratch / "replaced")
        os.replace(scratch / path.name, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with atomic(path) as scratch:
        scratch.write_text(text)


def write_json(path: str | Path, data: Any) -> None:
    """Writes indented JSON, whole or not at all; ValueError where a number is not finite."""
    write_text(path, json.dumps(data, indent=2, default=str, allow_nan=False) + "\n")


def write_manifest(output: str | Path, stage: str, settings: Mapping[str, Any]) -> None:
    """Writes `<output>.manifest.json`, which says how an output came about.

    Args:
        settings: whatever the stage was asked for: inputs, seeds, settings.
    """
    output = Path(output)
    write_json(output.with_name(f"{output.name}.manifest.json"), manifest(stage, settings))


def manifest(stage: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The stage, its settings, the code (git commit and hash), libraries, device and time."""
    return {
        "stage": stage,
        "settings": dict(settings),
        "code": {"commit": git_commit(), "hash": code_hash(stage)},
        "versions": {"python": platform.python_version(), **_versions()},
        "device": _device(),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def git_commit() -> str | None:
    """The checked-out commit, with `+` when files differ from it; None outside a repository."""
    git = ["git", "-C", str(PACKAGE)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", "."], capture_output=True
        ).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


@cache
def code_hash(stage: str) -> str:
    """A hash of the package's modules that a stage imports, directly or not.

    Comments, docstrings and formatting don't count, so that only changes that can change a result
    do.

    Args:
        stage: a module or subpackage of `ecodiff`, such as "mask" or "evaluate.quality".

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    digest = hashlib.sha256()
    for path in sorted(_sources(stage)):
        digest.update(path.relative_to(PACKAGE).as_posix().encode())
        digest.update(ast.dump(_without_words(ast.parse(path.read_text()))).encode())
    return digest.hexdigest()[:12]


def _without_words(tree: ast.Module) -> ast.Module:
    """A module without its docstrings, those of attributes included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [
                one
                for one in node.body
                if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))
            ]
    return tree


def _sources(stage: str) -> set[Path]:
    """The files of a stage and of all that they import from the package."""
    folder = PACKAGE.joinpath(*stage.split("."))
    todo = sorted(folder.glob("*.py")) or _file(f"ecodiff.{stage}")
    if not todo:
        raise ModuleNotFoundError(f"ecodiff has no module {stage!r}")
    found = set[Path]()
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += [file for name in _imports(path) for file in _file(name)]
    return found


def _file(name: str) -> list[Path]:
    """The file of a dotted name when it is a module or subpackage of ours."""
    package, *parts = name.split(".")
    if (
        package != "ecodiff"
        or not parts
        or f"{name}.".startswith(tuple(f"{n}." for n in SHAPE_NO_RESULT))
    ):
        return []
    path = PACKAGE.joinpath(*parts)
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return [file for file in candidates if file.is_file()]


def _imports(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, at its top or within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            if node.module != "ecodiff":
                yield node.module


def _versions() -> dict[str, str]:
    """Versions of the libraries that shape results, those that are installed."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _device() -> str:
    """The GPU when a stage uses one, else the kind of processor."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()
