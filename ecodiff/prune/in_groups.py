"""Least-squares compensation in groups: later linears also correct the errors of earlier ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ecodiff.calibrate import Calibration, rows_of, watched
from ecodiff.models.structures import denoiser_of
from ecodiff.models.units import Structure, lines_left
from ecodiff.prune.compensate import refit, write
from ecodiff.prune.means import of_modulation
from ecodiff.trajectory.directions import Basis
from ecodiff.trajectory.gates import Gates
from ecodiff.trajectory.rollout import replaced_forward


@torch.no_grad()
def compensate_in_groups(
    pipe: DiffusionPipeline,
    structures: Sequence[Structure],
    kept: Mapping[str, Tensor],
    calibration: Calibration,
    *,
    groups: int,
    ridge: float,
    batch_size: int,
    bases: Mapping[str, Basis] = MappingProxyType({}),
) -> None:
    """Re-solve the consumers group by group, in the order of the forward pass; in place, before
    anything is cut.

    Each consumer is fitted to its output in the dense model, from the inputs that it gets in the
    model as pruned and compensated so far. Both models run on the denoiser inputs of the dense
    model's steps, one of which at a time is in memory. So later consumers correct errors of earlier
    ones, including consumers that lose no columns themselves. Modulation channels are removed
    before the first group and give their calibration means.

    Groups are OBS-Diff's "module packages"; OBS-Diff fits to the output of the pruned model instead
    of the dense one.

    Args:
        pipe: the dense pipeline.
        structures: its denoiser's structures.
        kept: structure name -> int64 (k,), units that stay.
        calibration: recorded of the dense model.
        groups: number of groups. The data are gathered once per group. 1 differs from `compensate`
            only by the removed modulation.
        ridge: relative strength of the ridge, see `compensate.solve`.
        batch_size: prompts that run together.
        bases: of linears whose units are directions of the input, see `Gates`.

    Raises:
        UserError: the calibration is of another model.
    """
    calibration = calibration.for_dense(pipe)
    denoiser = denoiser_of(pipe)
    order = _in_order(pipe, structures, calibration)
    columns = {m: torch.arange(denoiser.get_submodule(m).weight.shape[1]) for m in order}
    columns |= lines_left(denoiser, structures, kept, "columns")
    columns = {module: found.to(denoiser.device) for module, found in columns.items()}
    dense = {
        f"{module}.{name}": value.detach().clone()
        for module in order
        for name, value in denoiser.get_submodule(module).named_parameters()
    }
    means = of_modulation(structures, calibration.means)
    gates = Gates(structures, means=means, bases=bases).to(denoiser.device)
    solved = set[str]()
    for group in _split(order, groups):
        gone = [s for s in structures if s.name in kept]
        gone = [s for s in gone if all(port.module in solved for port in s.consumers)]
        gates.set({s.name: _stays(s, kept[s.name]) for s in gone})
        sums = _Sums(denoiser, dense, {m: columns[m] for m in group}, gates)
        with replaced_forward(denoiser, sums.step):
            calibration.drawn_by(pipe, batch_size)
        for module, (own, cross) in sums.found.items():
            linear = denoiser.get_submodule(module)
            bias = dense.get(f"{module}.bias")
            weight = dense[f"{module}.weight"].flatten(1)
            write(linear, columns[module], *refit(weight, bias, columns[module], own, cross, ridge))
        solved |= set(group)


class _Sums:
    """The moments of some consumers, summed up while the dense model draws: a step at a time is in
    memory.

    Attributes:
        found: linear name -> (X X^T, T X^T) of `refit`, float64, over all steps and prompts so far.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        dense: Mapping[str, Tensor],
        columns: Mapping[str, Tensor],
        gates: Gates,
    ) -> None:
        self.denoiser, self.forward = denoiser, denoiser.forward
        self.dense, self.columns, self.gates = dense, columns, gates
        self.found: dict[str, tuple[Tensor, Tensor]] = {}

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the denoiser's forward: that of the dense model, after which the model as
        compensated so far reads the same."""
        now: dict[str, Tensor] = {}
        then: dict[str, Tensor] = {}
        with self._dense_weights(), watched(self.denoiser, self.columns, partial(_keep_rows, then)):
            output = self.forward(*args, **kwargs)
        # `watched` hooks first, so it records a consumer's inputs before its own gates act.
        with (
            watched(self.denoiser, self.columns, partial(_keep_rows, now)),
            self.gates.attached(self.denoiser),
        ):
            self.forward(*args, **kwargs)
        for module, stays in self.columns.items():
            x, t = now.pop(module)[:, stays], then.pop(module)
            if f"{module}.bias" in self.dense:
                x, t = (torch.cat([rows, rows.new_ones(len(rows), 1)], 1) for rows in (x, t))
            own, cross = self.found.get(module, (0.0, 0.0))
            self.found[module] = (own + (x.T @ x).double(), cross + (t.T @ x).double())
        return output

    @contextmanager
    def _dense_weights(self) -> Iterator[None]:
        """Inside, consumers have their dense weights."""
        parameters = {name: self.denoiser.get_parameter(name) for name in self.dense}
        solved = {name: parameter.data for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.data = self.dense[name]
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = solved[name]


def _keep_rows(
    found: dict[str, Tensor], name: str, layer: nn.Module, args: tuple[Any, ...]
) -> None:
    found[name] = rows_of(layer, args[0])


def _in_order(
    pipe: DiffusionPipeline, structures: Sequence[Structure], calibration: Calibration
) -> list[str]:
    """The names of the consumers in the order in which a forward pass runs them."""
    names = dict.fromkeys(port.module for s in structures for port in s.consumers)
    seen: dict[str, None] = {}
    with watched(denoiser_of(pipe), names, lambda name, *_: seen.setdefault(name)):
        calibration.first(1).drawn_by(pipe, 1)
    return [*seen]


def _split(order: Sequence[str], groups: int) -> list[Sequence[str]]:
    """Split into `groups` consecutive parts of nearly equal size, or one part per name if fewer."""
    count = min(groups, len(order))
    edges = [part * len(order) // count for part in range(count + 1)]
    return [order[first:last] for first, last in pairwise(edges)]


def _stays(structure: Structure, kept: Tensor) -> Tensor:
    mask = torch.zeros(structure.units)
    mask[kept] = 1
    return mask
