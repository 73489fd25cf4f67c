"""Peak memory of a piece of work, in megabytes (10^6 bytes)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

MB = 1e6


def peak_memory(work: Callable[[], Any], held: Iterable[Tensor], device: str) -> float:
    """The most memory that tensors take at once during `work`.

    On CUDA it is `torch.cuda.max_memory_allocated`. A CPU has no such count, and a process' size
    depends on the allocator and on what ran before; so the bytes of all living tensors are
    counted, operation by operation. That count is exact, the same at every repetition, and blind
    only to what a single operation takes and gives back inside.

    Args:
        work: what to measure.
        held: tensors that exist before and must count too, such as weights (only for the CPU).
        device: where the work runs.

    Returns:
        megabytes, weights included.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) / MB
    with _LivingTensors(held) as living:
        work()
    return living.peak / MB


def tensors_of(*modules: torch.nn.Module) -> list[Tensor]:
    """Parameters and buffers of modules."""
    return [t for module in modules for t in (*module.parameters(), *module.buffers())]


class _LivingTensors(TorchDispatchMode):
    """Counts the bytes of all storages that operations return, until they are freed.

    torch's own `MemTracker` does the same, but refuses a denoiser that is called once a step.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        tree_map_only(Tensor, self._count, list(held))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type == "meta" or key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)
