"""The stage `prune`: from a mask to a smaller model."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from ecodiff.prune.cut import prune

__all__ = ["prune"]


class _Verb(ModuleType):
    """`ecodiff.prune` is this package and the public verb alike: calling the one is the other."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        prune(*args, **kwargs)


sys.modules[__name__].__class__ = _Verb
