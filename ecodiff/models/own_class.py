"""Lets diffusers load pruned models with the class of this package instead of the folder's copy.

A pruned folder holds a copy of `ecodiff.models.pruned` for machines without ecodiff; diffusers runs
it only with `trust_remote_code=True`. Once ecodiff is imported, its own class is used, and no code
of the folder runs: by pipelines, by `AutoModel`, and by the dense class, with which scripts that
train load a component.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


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
            spec.loader.exec_module = lambda module: (run(module), LOADERS[name](module))  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Patch diffusers' loaders, now or when they are imported."""
    for name in LOADERS:
        if name in sys.modules:
            LOADERS[name](sys.modules[name])
    sys.meta_path.insert(0, _AfterImport([n for n in LOADERS if n not in sys.modules]))


def _own_code(loader: ModuleType) -> None:
    """The class that a folder's code defines is that of this package."""
    from_folder = loader.get_class_from_dynamic_module

    def find(folder: str, module_file: str, class_name: str, **kwargs: Any) -> type:
        from ecodiff.models import pruned

        if module_file == pruned.CLASS_FILE:
            return getattr(pruned, class_name)
        return from_folder(folder, module_file=module_file, class_name=class_name, **kwargs)

    loader.get_class_from_dynamic_module = find


def _auto_model(loader: ModuleType) -> None:
    """`AutoModel` takes each part of a folder by the class that model_index.json has for it."""
    _own_code(loader)
    is_trusted, read = loader.resolve_trust_remote_code, loader.AutoModel.load_config.__func__

    # Without code there is nothing to trust; it refuses that otherwise.
    def resolve(trust: bool, source: str, has_code: bool) -> bool:
        return has_code and is_trusted(trust, source, has_code)

    def load_config(cls: type, *args: Any, **kwargs: Any) -> Any:
        config = read(cls, *args, **kwargs)
        if cls.config_name == "model_index.json":
            config.pop("auto_map", None)  # where others find the denoiser's code
        return config

    loader.resolve_trust_remote_code = resolve
    loader.AutoModel.load_config = classmethod(load_config)


def _dense_classes(configs: ModuleType) -> None:
    """`UNet2DConditionModel.from_pretrained` and its like give the pruned class where the config is
    a pruned model's."""
    build = configs.ConfigMixin.from_config.__func__

    def from_config(cls: type, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(config, Mapping) and "pruned" in config:
            from ecodiff.models import pruned

            if not issubclass(cls, pruned.Pruned):
                return pruned.pruned_class(cls).from_config(config, *args, **kwargs)
        return build(cls, config, *args, **kwargs)

    configs.ConfigMixin.from_config = classmethod(from_config)


# Where diffusers asks for the code or the class of a folder's part.
LOADERS = {
    "diffusers.pipelines.pipeline_loading_utils": _own_code,
    "diffusers.models.auto_model": _auto_model,
    "diffusers.configuration_utils": _dense_classes,
}
