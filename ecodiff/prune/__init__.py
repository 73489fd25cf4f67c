"""The stage `prune`: from a mask to a smaller model."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from ecodiff.prune.cut import prune

__all__ = ["prune"]


class _Verb(ModuleType):
    """Makes this package callable: `ecodiff.prune` is both the package and the public function."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        prune(*args, **kwargs)


sys.modules[__name__].__class__ = _Verb
