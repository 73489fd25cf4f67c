"""Lets diffusers take a pruned denoiser's class from this package, not from the model's folder.

The folder holds the class's file for machines without ecodiff, and diffusers runs a folder's code
only with `trust_remote_code=True`. Whoever has imported ecodiff has that class already, so nothing
of the folder needs to run.
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
    """Prepares the loader as soon as diffusers imports it: ecodiff itself does without torch."""

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
    """Prepare diffusers' loader, now or when it is imported."""
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
