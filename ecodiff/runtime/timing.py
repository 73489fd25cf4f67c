"""How long a piece of work takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of `work`, until the device has done all of it and nothing else."""
    start = now(device)
    work()
    return now(device) - start


def now(device: torch.device) -> float:
    """Wall-clock time in seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
