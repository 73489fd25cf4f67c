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

# Where diffusers asks for the code of a folder: for pipelines, and for a model alone.
LOADERS = ["diffusers.pipelines.pipeline_loading_utils", "diffusers.models.auto_model"]


class _AfterImport(MetaPathFinder):
    """Patches diffusers' loaders when they are imported, so that importing ecodiff imports no
    torch."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.names:
            return None
        self.names.remove(name)  # or the search below would end here again
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (run(module), _prepare(module))  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Patch diffusers' loaders, now or when they are imported."""
    for name in LOADERS:
        if name in sys.modules:
            _prepare(sys.modules[name])
    sys.meta_path.insert(0, _AfterImport([n for n in LOADERS if n not in sys.modules]))


def _prepare(loader: ModuleType) -> None:
    from_folder = loader.get_class_from_dynamic_module
    if hasattr(loader, "AutoModel"):
        # It looks for code in model_index.json alone, and refuses a folder whose parts have it.
        is_trusted = loader.resolve_trust_remote_code
        loader.resolve_trust_remote_code = lambda trust, source, has_code: (
            has_code and is_trusted(trust, source, has_code)
        )

    def find(folder: str, module_file: str, class_name: str, **kwargs: Any) -> type:
        from ecodiff.models import pruned

        if module_file == pruned.CLASS_FILE:
            return getattr(pruned, class_name)
        return from_folder(folder, module_file=module_file, class_name=class_name, **kwargs)

    loader.get_class_from_dynamic_module = find
