"""The processes of one optimisation, each on its own device and with its share of the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

BUCKET = 2**24  # elements that are exchanged at once


class Workers:
    """The processes of an `accelerate launch`; one, where there was none.

    Args:
        device: this process' device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @cached_property
    def _state(self) -> PartialState:
        return PartialState(cpu=self.device.type == "cpu")

    @property
    def count(self) -> int:
        """How many processes there are."""
        return self._state.num_processes

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files."""
        return self._state.is_main_process

    def own(self, count: int) -> slice:
        """This process' part of `count` things, which all processes share evenly."""
        each = count // self.count
        return slice(self._state.process_index * each, (self._state.process_index + 1) * each)

    def mean(self, value: float) -> float:
        """The mean over all processes of a number."""
        return reduce(torch.tensor(value, device=self.device), "mean").item()

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over all processes, in place, many in one exchange."""
        if self.count == 1:
            return
        for bucket in _buckets(tensors):
            together = reduce(torch.cat([tensor.flatten() for tensor in bucket]), "mean")
            sizes = [tensor.numel() for tensor in bucket]
            for tensor, mean in zip(bucket, together.split(sizes), strict=True):
                tensor.copy_(mean.view_as(tensor))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, together as large as is worth a copy."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        size = sum(one.numel() for one in bucket)
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
