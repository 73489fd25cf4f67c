"""The state of an unfinished optimisation: what a stopped or killed job continues from."""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ecodiff.runtime.artifacts import atomic, sweep
from ecodiff.runtime.errors import Stopped

log = logging.getLogger(__name__)


def unfinished(out: Path) -> Path:
    """Where the state of an unfinished output lies: beside it, as retries remove outputs."""
    return out.with_name(f".{out.name}.unfinished")


def beside(scratch: Path, what: str) -> Path:
    """A folder that a person looks into while the state of an unfinished output lies there."""
    return scratch.with_name(f"{scratch.stem.lstrip('.')}.{what}")


class Termination:
    """Turns SIGTERM into `Stopped`, as soon as nothing is half done.

    Schedulers send it before they kill a job: when its time is up, or a better one wants its place.
    """

    def __init__(self) -> None:
        self.asked, self.may_stop = False, True

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Inside, SIGTERM raises `Stopped`. Only the main thread of a process can be told."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """Inside, it waits for the end of the block, so that what changes there changes whole."""
        self.may_stop = False
        try:
            yield
        finally:
            self.may_stop = True
        if self.asked:
            raise Stopped

    def _stop(self, _signal: int, _frame: FrameType | None) -> None:
        self.asked = True
        if self.may_stop:
            raise Stopped


class State:
    """Parameters, an optimiser's moments and anything that JSON holds, in one safetensors file.

    Args:
        path: the file, or None to keep nothing.
        identity: what the run depends on; the state of a run that differs is not continued.
        parameters: name -> parameter, each one that `optimiser` updates.
        optimiser: an AdamW, of torch or torchao.
        copies: of parameters, such as their moving average: name of the copy -> parameter name ->
            tensor; restored in place.
    """

    def __init__(
        self,
        path: Path | None,
        identity: dict[str, Any],
        parameters: Mapping[str, Tensor],
        optimiser: torch.optim.Optimizer,
        copies: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.identity = json.loads(json.dumps(identity, default=str))
        self.parameters, self.optimiser = dict(parameters), optimiser
        self.kept = {"value": self.parameters, **(copies or {})}

    def write(self, info: Mapping[str, Any]) -> None:
        """Write the state, whole or not at all, with whatever else the run needs to go on."""
        if self.path is None:
            return
        text = json.dumps({"identity": self.identity, "info": info})
        with atomic(self.path) as scratch:
            save_file(self._tensors(), scratch, metadata={"ecodiff": text})

    def restore(self, writes: bool = True) -> dict[str, Any] | None:
        """Load the state into parameters and optimiser; what `write` was given, None without.

        Args:
            writes: whether this process keeps the file from here on; of several, the first does.
        """
        found = self._read()
        if not writes:
            self.path = None
        return found

    def _read(self) -> dict[str, Any] | None:
        if self.path is None or not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                found = json.loads(file.metadata()["ecodiff"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            log.warning("%s is not readable; it starts anew", self.path)
            return None
        if found["identity"] != self.identity:
            log.warning("%s is of another run; it starts anew", self.path)
            return None
        self._load(tensors)
        return found["info"]

    def discard(self) -> None:
        """Remove the file: the run is finished."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            sweep(self.path)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            f"{part}/{name}": value
            for part, values in self.kept.items()
            for name, value in values.items()
        }
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state[parameter].items():
                tensors |= {f"{part}/{name}": one for part, one in _parts(key, value).items()}
        return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}

    @torch.no_grad()
    def _load(self, tensors: dict[str, Tensor]) -> None:
        if len(tensors) > sum(map(len, self.kept.values())):  # else saved before the first step
            self._make_moments()
        for part, values in self.kept.items():
            for name, value in values.items():
                value.copy_(tensors[f"{part}/{name}"])
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state[parameter].items():
                for part, one in _parts(key, value).items():
                    one.copy_(tensors[f"{part}/{name}"])

    def _make_moments(self) -> None:
        """An optimiser makes its moments at its first step: one that moves nothing."""
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


def _parts(key: str, value: Tensor) -> dict[str, Tensor]:
    """The plain tensors that a moment consists of: torchao's of 8 bits have codes and scales."""
    if not is_traceable_wrapper_subclass(value):
        return {key: value}
    names, _ = value.__tensor_flatten__()
    return {f"{key}.{name}": getattr(value, name) for name in names}
