"""The processes that learn one mask together, each on its own device and share of the prompts."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn


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
        """This process' part of `count` prompts, which all processes share evenly."""
        each = count // self.count
        return slice(self._state.process_index * each, (self._state.process_index + 1) * each)

    def mean(self, value: float) -> float:
        """The mean over all processes of a number."""
        return reduce(torch.tensor(value, device=self.device), "mean").item()

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over all processes, in one exchange."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        together = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, mean in zip(gradients, together.split(sizes), strict=True):
            gradient.copy_(mean.view_as(gradient))
