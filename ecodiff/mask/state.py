"""The state of an unfinished mask learning: what a stopped or preempted job continues from."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ecodiff.artifacts import atomic
from ecodiff.gates import Gates
from ecodiff.mask.objective import Objective

log = logging.getLogger(__name__)


class State:
    """Logits, AdamW's moments, multipliers and history in one safetensors file.

    Args:
        path: the file, or None to keep nothing.
        identity: what the run depends on; the state of a run that differs is not continued.
    """

    def __init__(
        self,
        path: Path | None,
        identity: dict[str, Any],
        gates: Gates,
        optimiser: torch.optim.Optimizer,
        objective: Objective,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.identity = json.loads(json.dumps(identity, default=str))
        self.gates, self.optimiser, self.objective = gates, optimiser, objective

    def write(self, history: list[dict[str, float]]) -> None:
        """Write the state, whole or not at all."""
        if self.path is None:
            return
        info = {"identity": self.identity, "history": history, "objective": asdict(self.objective)}
        with atomic(self.path) as scratch:
            save_file(self._tensors(), scratch, metadata={"ecodiff": json.dumps(info)})

    def restore(self) -> list[dict[str, float]]:
        """Load the state into gates, optimiser and objective; returns the history so far."""
        if self.path is None or not self.path.is_file():
            return []
        try:
            with safe_open(self.path, framework="pt") as file:
                info = json.loads(file.metadata()["ecodiff"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            log.warning("%s is not readable; learning starts anew", self.path)
            return []
        if info["identity"] != self.identity:
            log.warning("%s is of another run; learning starts anew", self.path)
            return []
        self._load(tensors)
        for key, value in info["objective"].items():
            setattr(self.objective, key, value)
        return info["history"]

    def discard(self) -> None:
        """Remove the file: the run is finished."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name, logits in self.gates.logits.items():
            tensors[f"logits/{name}"] = logits.detach().cpu().contiguous()
            for key, value in self.optimiser.state[logits].items():
                tensors[f"{key}/{name}"] = value.cpu().contiguous()
        return tensors

    def _load(self, tensors: dict[str, Tensor]) -> None:
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            logits = self.gates.logits[name]
            if part == "logits":
                logits.data.copy_(value)
            else:  # AdamW keeps its step counters on the CPU
                device = "cpu" if part == "step" else logits.device
                self.optimiser.state[logits][part] = value.to(device)
