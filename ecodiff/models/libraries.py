"""What libraries do by themselves, and how to have it otherwise: what they say, and compiling."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from ecodiff.runtime.errors import UserError

_LOGS = (diffusers_logging, transformers_logging)


def hide_bars() -> None:
    """From now on. Bars are for people; a job's log wants lines, and ours has its own."""
    for log in _LOGS:
        log.disable_progress_bar()


@contextmanager
def errors_only() -> Iterator[None]:
    """Inside, hints and warnings are left out: what matters of them is said in one line of ours."""
    before = [log.get_verbosity() for log in _LOGS]
    for log in _LOGS:
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, level in zip(_LOGS, before, strict=True):
            log.set_verbosity(level)


def without_compiling() -> AbstractContextManager:
    """Inside, compiled modules run as they are written: hooks that were added later count."""
    is_in_use = "torch._dynamo" in sys.modules  # importing it takes seconds
    return torch.compiler.set_stance("force_eager") if is_in_use else nullcontext()


def plain(module: Any) -> Any:
    """The module that `torch.compile` wrapped; any other as it is."""
    return getattr(module, "_orig_mod", module)


def refuse_offloaded(module: nn.Module, what: str) -> None:
    """Raise `UserError` when the weights lie elsewhere, kept by hooks that know no others.

    Args:
        module: any; one whose weights move as a whole (`enable_model_cpu_offload`) is fine.
        what: is to be done with it.
    """
    for part in module.modules():
        is_empty = hasattr(part, "_hf_hook") and any(p.is_meta for p in part.parameters(False))
        registry = getattr(part, "_diffusers_hook", None)
        if is_empty or (registry is not None and registry.get_hook("group_offloading")):
            raise UserError(
                f"{what}: {type(module).__name__} is offloaded; do this before sequential or group"
                " offloading, or after remove_all_hooks() of the pipeline"
            )


def refuse_quantised(module: nn.Module) -> None:
    """Raise `UserError` when weights are packed, of a quantiser's type or of eight bits: their rows
    and columns can't be chosen."""
    for name, weight in module.named_parameters():
        kind = type(weight.data) if type(weight) is nn.Parameter else type(weight)
        if kind is not Tensor or not weight.is_floating_point() or weight.element_size() < 2:
            found = weight.dtype if kind is Tensor else kind.__name__
            raise UserError(
                f"{type(module).__name__} is quantised ({name}: {found}); prune the model that it"
                " was made of, and quantise what is left (see docs/next-steps.md)"
            )
