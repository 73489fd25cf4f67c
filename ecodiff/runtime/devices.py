"""Which device a job runs on: on a machine with several GPUs, each job its own."""

from __future__ import annotations

import ctypes
import logging
import re
import tempfile
import time
from functools import cache
from pathlib import Path

import psutil
import torch

from ecodiff.runtime.errors import UserError
from ecodiff.runtime.locks import lock

log = logging.getLogger(__name__)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
_leases: list[int] = []  # open files; a lease lasts as long as its process


def choose_device(wanted: str = "auto") -> str:
    """A torch device; `cuda` is a GPU that no job of ours holds, `auto` such a one or the CPU.

    Snakemake only counts GPUs and a SLURM job sees only its own, so the choice between the
    visible ones is made here, once a process. Waits until one is free.

    Raises:
        UserError: there is no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted not in ("auto", "cuda") or (wanted == "cuda" and not count):
        return _present(wanted, count)
    return _free_gpu(count) if count else "cpu"


@cache
def _free_gpu(count: int) -> str:
    """The first of so many GPUs whose lock is free, which this process then keeps."""
    waiting = False
    while True:
        for index in range(count):
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


def _present(wanted: str, count: int) -> str:
    """A device as it was asked for, unless there is no such one among so many GPUs."""
    allowed = ["auto", "cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if wanted in allowed:
        return wanted
    gpus = "sees no GPU" if not count else f"sees {count} GPU{'s' if count > 1 else ''}"
    why = f", and torch {gpus}" if re.fullmatch(r"cuda(:\d+)?", wanted) else ""
    raise UserError(f"device: {wanted} is not one of {', '.join(allowed)}{why}")


def _lease(name: str, folder: Path | None = None) -> bool:
    """Whether this process now holds the lock of a name, which all users of a machine share."""
    path = (folder or Path(tempfile.gettempdir())) / f"ecodiff-{name}.lock"
    try:
        file = lock(path)
    except OSError as error:
        raise UserError(f"{path}: is another user's and can't be locked; remove it") from error
    if file is None:
        return False
    _leases.append(file)
    return True
