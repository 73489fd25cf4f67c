"""EcoDiff: learnable sparsity for diffusion models.

    structures = ecodiff.discover(pipe)
    mask = ecodiff.learn_mask(pipe, prompts, sparsity=0.2)
    ecodiff.prune(pipe, mask)
    ecodiff.save(pipe, "out")
    pipe = ecodiff.load("out")

Names are imported on first use: torch and diffusers take seconds, and the config, the report and
the command line's help do without them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ecodiff.models import own_class

__version__ = "0.1.0"

_HOMES = {
    "Mask": "ecodiff.mask",
    "Structure": "ecodiff.models.structures",
    "discover": "ecodiff.models.structures",
    "fit_lora": "ecodiff.models.adapters",
    "learn_mask": "ecodiff.mask",
    "load": "ecodiff.models.saving",
    "save": "ecodiff.models.saving",
    "score": "ecodiff.mask",
    "select": "ecodiff.mask",
    # diffusers looks for the base class beside the class of a component that it is given.
    "ModelMixin": "diffusers",
}

__all__ = [
    "Mask",
    "Structure",
    "discover",
    "fit_lora",
    "learn_mask",
    "load",
    "prune",
    "save",
    "score",
    "select",
]


def __getattr__(name: str) -> Any:
    if name == "prune":
        return import_module("ecodiff.prune")  # a package that can be called
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name.startswith("Pruned"):
        value = getattr(import_module("ecodiff.models.pruned"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


own_class.install()
