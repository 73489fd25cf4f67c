"""Lets diffusers load pruned models with the class of this package instead of the folder's copy.

A pruned folder holds a copy of `ecodiff.models.pruned` for machines without ecodiff; diffusers runs
it only with `trust_remote_code=True`. Once ecodiff is imported, its own class is used, and no code
of the folder runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

LOADER = "diffusers.pipelines.pipeline_loading_utils"


class _AfterImport(MetaPathFinder):
    """Patches diffusers' loader when it is imported, so that importing ecodiff imports no torch."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != LOADER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (run(module), _prepare(module))  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Patch diffusers' loader, now or when it is imported."""
    if LOADER in sys.modules:
        _prepare(sys.modules[LOADER])
    else:
        sys.meta_path.insert(0, _AfterImport())


def _prepare(loader: ModuleType) -> None:
    from_folder = loader.get_class_from_dynamic_module

    def find(folder: str, module_file: str, class_name: str, **kwargs: Any) -> type:
        from ecodiff.models import pruned

        if module_file == pruned.CLASS_FILE:
            return getattr(pruned, class_name)
        return from_folder(folder, module_file=module_file, class_name=class_name, **kwargs)

    loader.get_class_from_dynamic_module = find
