"""Which code made an output: the commit, and a hash of the modules that shape a stage's results.

Imports no torch.
"""

from __future__ import annotations

import ast
import hashlib
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# How files are written and errors told changes no result; the values of settings reach a stage as
# parameters, which Snakemake compares by themselves.
SHAPE_NO_RESULT = (
    "ecodiff.config",
    "ecodiff.runtime.artifacts",
    "ecodiff.runtime.code",
    "ecodiff.runtime.errors",
    "ecodiff.runtime.locks",
    "ecodiff.runtime.parts",
    "ecodiff.runtime.provenance",
    "ecodiff.runtime.slurm",
)


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
    """A hash of the package's modules that a stage imports, directly or not, and of the templates
    beside them.

    Comments, docstrings and formatting don't count, so that only changes that can change a result
    do.

    Args:
        stage: a module or subpackage of `ecodiff`, such as "mask" or "evaluate.quality".

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    digest, sources = hashlib.sha256(), sorted(_sources(stage))
    for path in sources:
        digest.update(path.relative_to(PACKAGE).as_posix().encode())
        digest.update(ast.dump(_without_words(ast.parse(path.read_text()))).encode())
    for folder in sorted({path.parent / "templates" for path in sources}):
        for template in sorted(folder.glob("*")):
            digest.update(template.read_bytes())
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
