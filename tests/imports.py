"""What an import brings with it, and what is there to be imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import (
    Distribution,
    DistributionFinder,
    distribution,
    packages_distributions,
)
from pathlib import Path
from types import ModuleType

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def loaded_by(module: str) -> set[str]:
    """The names of all modules that a fresh interpreter holds after importing one."""
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def normal(name: str) -> str:
    """A distribution's name in the one spelling that an index uses."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(*asked: str) -> set[str]:
    """The distributions that installing requirements brings, such as `ecodiff[report]`.

    What this project needs is read from pyproject.toml, all else from what is installed here.
    """
    found: set[tuple[str, frozenset[str]]] = set()
    todo = [*map(Requirement, asked)]
    while todo:
        requirement = todo.pop()
        name, extras = normal(requirement.name), frozenset(requirement.extras)
        if (name, extras) in found:
            continue
        found.add((name, extras))
        if name == PROJECT["name"]:
            needed = [*PROJECT["dependencies"]]
            needed += [text for one in extras for text in PROJECT["optional-dependencies"][one]]
        else:
            needed = distribution(name).requires or []
        for other in map(Requirement, needed):
            asked_for = [{"extra": extra} for extra in extras] or [{"extra": ""}]
            if other.marker is None or any(map(other.marker.evaluate, asked_for)):
                todo.append(other)
    return {name for name, _ in found}


class Only(MetaPathFinder):
    """Stands for `PathFinder`, and finds only some distributions and what belongs to none.

    To libraries that ask, by import or by metadata, all others are not installed.
    """

    def __init__(self, installed: set[str]) -> None:
        self.installed = installed
        self.hidden = {
            module
            for module, owners in packages_distributions().items()
            if not installed & {normal(owner) for owner in owners}
        }

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        hidden = name.partition(".")[0] in self.hidden
        return None if hidden else PathFinder.find_spec(name, path, target)

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> list[Distribution]:
        found = PathFinder.find_distributions(context or DistributionFinder.Context())
        return [one for one in found if normal(one.metadata["Name"]) in self.installed]


def run_with_only(code: str, *asked: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter as if some requirements were all that is installed."""
    hide = "import sys, imports; imports.hide_all_but(set(sys.argv.pop(1).split()))"
    command = [sys.executable, "-c", f"{hide}\n{code}", " ".join(closure(*asked))]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | paths)


def hide_all_but(installed: set[str]) -> None:
    """Takes what is not among some distributions out of this interpreter."""
    only = Only(installed)
    sys.meta_path[:] = [only if finder is PathFinder else finder for finder in sys.meta_path]
    for module in [*sys.modules]:
        if module.partition(".")[0] in only.hidden:
            del sys.modules[module]
