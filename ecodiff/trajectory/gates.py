"""Hard concrete gates on the units of structures (Louizos et al., 2018; EcoDiff, "mask learning").

A gate multiplies what a consumer reads (or what a modulation linear writes), so gating with 0 and
cutting are the same algebra: `W[:, keep] @ x[keep] == W @ (m * x)` for a 0/1 mask m. A closed gate
may let the unit's mean through instead of 0, which a bias gives when the unit is gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ecodiff.models.structures import Port, Structure

TEMPERATURE = 0.83
STRETCH = (-0.1, 1.1)


def sample_gate(
    logits: Tensor,
    u: Tensor,
    floor: float,
    temperature: float = TEMPERATURE,
    stretch: tuple[float, float] = STRETCH,
) -> Tensor:
    """Turn uniform noise into gates (EcoDiff, "hard concrete"; `floor` is its noise floor).

    Args:
        logits: (units,), fp32.
        u: (..., units) in [0, 1), fp32.
        floor: d >= 0 added to `u` and to `1 - u`; bounds the noise, 0 is the original.
        temperature: of the sigmoid.
        stretch: (low < 0, high > 1) of the interval before clipping.

    Returns:
        (..., units) in [0, 1], differentiable in `logits`.
    """
    low, high = stretch
    noise = torch.log(u + floor) - torch.log(1 - u + floor)
    return (torch.sigmoid((noise + logits) / temperature) * (high - low) + low).clamp(0, 1)


def open_probability(
    logits: Tensor,
    floor: float,
    temperature: float = TEMPERATURE,
    stretch: tuple[float, float] = STRETCH,
) -> Tensor:
    """P(gate > 0), exact for any noise floor (EcoDiff, "L0 regularisation").

    With a floor the noise is bounded by log((1 + d) / d), so a gate whose logit is far enough out
    is open (closed) with certainty: P is exactly 1 (0) there, and its gradient 0.

    Returns:
        Shape and dtype of `logits`, in [0, 1].
    """
    low, high = stretch
    threshold = temperature * math.log(-low / high) - logits  # open <=> noise > threshold
    # (e^c (1 + d) - d) / (1 + e^c), in a form that does not overflow.
    return 1 - (torch.sigmoid(threshold) * (1 + 2 * floor) - floor).clamp(0, 1)


class Gates(nn.Module):
    """One gate a unit, for every structure; logits are fp32 whatever the model's dtype.

    Values are held from one `draw` (or `set`) to the next, so that all denoising steps and their
    recomputation see the same sample.

    Args:
        structures: what to gate.
        first_logit: of all units.
        floor: the noise floor.
        means: module -> what it is given (modulation: what it gives) by a closed gate, see
            `Calibration`; 0 where there is none. A bias can give it when the unit is gone.
    """

    def __init__(
        self,
        structures: Iterable[Structure],
        first_logit: float = 3.0,
        floor: float = 0.0,
        means: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.structures = list(structures)
        self.floor, self.means = floor, dict(means)
        for s in self.structures:
            logits = torch.full((s.units,), first_logit, dtype=torch.float32)
            # torch forbids dots in the names of parameters
            self.register_parameter(s.name.replace(".", "/"), nn.Parameter(logits))
        self._inputs = _by_module((s, port) for s in self.structures for port in s.consumers)
        self._outputs = _by_module(
            (s, port) for s in self.structures if not s.consumers for port in s.producers
        )
        self._multipliers: dict[str, Tensor] = {}

    @property
    def logits(self) -> dict[str, nn.Parameter]:
        """Structure name -> fp32 parameter (units,)."""
        return {s.name: self.get_parameter(s.name.replace(".", "/")) for s in self.structures}

    def draw(
        self, batch: int, generator: torch.Generator | None = None, own: slice = slice(None)
    ) -> None:
        """Sample one gate a unit and prompt, held until the next call.

        Args:
            batch: number of prompts n; values are (n, units).
            generator: source of the noise; with a CPU generator the sample is the same on every
                device.
            own: the prompts of this process; what others draw is drawn here too and left.
        """
        device = generator.device if generator is not None else torch.device("cpu")
        values = {}
        for name, logits in self.logits.items():
            u = torch.rand(batch, len(logits), generator=generator, device=device)[own]
            values[name] = sample_gate(logits, u.to(logits.device), self.floor)
        self._hold(values)

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Hold fixed gates, e.g. a mask; structures without a value stay fully open.

        Args:
            values: structure name -> (units,), bool or float.

        Raises:
            ValueError: an unknown structure or a wrong number of units.
        """
        logits = self.logits
        for name, value in values.items():
            if name not in logits:
                raise ValueError(f"gates: no structure is called {name}")
            if value.shape != logits[name].shape:
                raise ValueError(
                    f"gates of {name}: {tuple(value.shape)} values, {len(logits[name])} units"
                )
        self._hold(
            {
                name: values.get(name, torch.ones_like(logit)).to(logit)[None]
                for name, logit in logits.items()
            }
        )

    def open(self, batch: int) -> dict[str, Tensor]:
        """Hold fully open gates, one a unit and prompt, until the next call.

        Returns structure name -> (batch, units), leaves that take gradients.
        """
        leaves = {
            name: torch.ones(batch, len(logits), device=logits.device, requires_grad=True)
            for name, logits in self.logits.items()
        }
        self._hold(leaves)
        return leaves

    def _hold(self, values: dict[str, Tensor]) -> None:
        """Lay the gates out as one multiplier a linear; several structures may share a linear."""
        device = next(iter(values.values())).device
        self.means = {module: mean.to(device) for module, mean in self.means.items()}
        self._multipliers = {
            module: _multiplier(ports, values)
            for module, ports in (self._inputs | self._outputs).items()
        }

    @contextmanager
    def attached(self, denoiser: nn.Module) -> Iterator[None]:
        """Gate `denoiser` inside the context, with the held values; hooks go on exit, always.

        Inputs of consumers and outputs of modulation linears are drawn towards their mean, or 0, in
        their own dtype. Their batch is k * n, k guidance branches one after the other (n prompts,
        or 1: any batch).

        Raises:
            RuntimeError: (in the forward pass) nothing held yet, or the batch does not fit.
        """
        handles = []
        try:
            for module in self._inputs:
                linear = denoiser.get_submodule(module)
                handles.append(linear.register_forward_pre_hook(partial(self._gate_input, module)))
            for module in self._outputs:
                linear = denoiser.get_submodule(module)
                handles.append(linear.register_forward_hook(partial(self._gate_output, module)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _gate_input(self, name: str, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if isinstance(layer, nn.Conv2d):
            return (self._gated(name, args[0].movedim(1, -1)).movedim(-1, 1), *args[1:])
        return (self._gated(name, args[0]), *args[1:])

    def _gate_output(
        self, name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor:
        return self._gated(name, output)

    def _gated(self, name: str, x: Tensor) -> Tensor:
        """Mix x, (k * n, ..., columns), with the means, by the held (n, columns)."""
        if name not in self._multipliers:
            raise RuntimeError("gates have no values: draw() or set() them before the model runs")
        gate = self._multipliers[name].to(x.device, x.dtype)
        prompts, covered = gate.shape
        branches, rest = divmod(len(x), prompts)
        if rest:
            raise RuntimeError(f"{name}: batch {len(x)} is no multiple of {prompts} drawn prompts")
        # Columns of structures that were left out come last or are ones already.
        gate = functional.pad(gate, (0, x.shape[-1] - covered), value=1.0)
        if prompts > 1:
            gate = gate.repeat(branches, 1)
        gate = gate.view(len(gate), *[1] * (x.ndim - 2), -1)
        if name not in self.means:
            return x * gate
        return torch.lerp(self.means[name].to(x.device, x.dtype), x, gate)

    def expected_sparsity(self, total_parameters: int) -> dict[str, Tensor]:
        """Expected share of `total_parameters` that is removed of each kind of structure.

        Scalars, fp32, differentiable; their sum is the expected sparsity.
        """
        return self.shares(
            lambda logits: 1 - open_probability(logits, self.floor), total_parameters
        )

    def shares(
        self, closed: Callable[[Tensor], Tensor], total_parameters: int
    ) -> dict[str, Tensor]:
        """Kind -> share of `total_parameters` of its units, each as far as `closed` says.

        Args:
            closed: logits (units,) -> how far each unit is closed, (units,).
        """
        found: dict[str, Tensor] = {}
        logits = self.logits
        for s in self.structures:
            share = closed(logits[s.name]).sum() * (s.unit_parameters / total_parameters)
            found[s.kind] = found.get(s.kind, 0) + share
        return found


def _by_module(
    ports: Iterable[tuple[Structure, Port]],
) -> dict[str, list[tuple[Structure, Port]]]:
    modules: dict[str, list[tuple[Structure, Port]]] = {}
    for structure, port in ports:
        modules.setdefault(port.module, []).append((structure, port))
    return modules


def _multiplier(ports: list[tuple[Structure, Port]], values: dict[str, Tensor]) -> Tensor:
    """Spread (n, units) gates over the columns that the units own; ones elsewhere: (n, columns)."""
    size = max(max(port.offsets) + s.units * s.width for s, port in ports)
    gates = [values[s.name].repeat_interleave(s.width, dim=1) for s, _ in ports]
    multiplier = gates[0].new_ones(len(gates[0]), size)
    for (s, port), gate in zip(ports, gates, strict=True):
        columns = s.columns(port, torch.arange(s.units, device=gate.device))
        multiplier = multiplier.index_copy(1, columns, gate.repeat(1, len(port.offsets)))
    return multiplier
