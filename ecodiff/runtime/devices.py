"""Which device a job runs on: on a machine with several GPUs, each job its own."""

from __future__ import annotations

import ctypes
import fcntl
import logging
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import TextIO

import psutil
import torch

log = logging.getLogger(__name__)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
_leases: list[TextIO] = []  # a lease lasts as long as its process


@cache
def choose_device(wanted: str = "auto") -> str:
    """A torch device; `auto` is a GPU that no other job of ours holds, or the CPU without any.

    Snakemake only counts GPUs and a SLURM job sees only its own, so the choice between the
    visible ones is made here, by a lock on a file, once a process. Waits until one is free.
    """
    if wanted != "auto":
        return wanted
    if not torch.cuda.is_available():
        return "cpu"
    waiting = False
    while True:
        for index in range(torch.cuda.device_count()):
            if _lease(str(torch.cuda.get_device_properties(index).uuid)):
                return f"cuda:{index}"
        if not waiting:
            log.info("waiting for a free GPU")
            waiting = True
        time.sleep(2)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; of the CPU, what the machine has available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def keep_freed_memory() -> None:
    """Let the C library keep the memory that tensors give back, for the next ones.

    Each denoising step frees and takes the same large blocks. Returned to the system, as glibc does
    by default, they are cleared page by page when they come back: a fifth of the time on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # not glibc
    mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest that it takes
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _lease(name: str, folder: Path | None = None) -> bool:
    """Whether this process now holds the lock of a name."""
    path = (folder or Path(tempfile.gettempdir())) / f"ecodiff-{name}.lock"
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    _leases.append(file)
    return True
