"""Hard concrete gates on the units of structures (Louizos et al. 2018; EcoDiff, "mask learning").

Each unit has one logit `a`. With uniform noise u ~ U(0, 1), temperature b, stretch (g, z) and noise
floor d >= 0, its gate is

    s    = sigmoid((log(u + d) - log(1 - u + d) + a) / b)
    gate = clip(s * (z - g) + g, 0, 1)

and the probability that it is not closed is

    c           = b * log(-g / z) - a
    P(gate > 0) = 1 - clip((e^c (1 + d) - d) / (1 + e^c), 0, 1)

With d = 0 this is the hard concrete distribution itself, and P(gate > 0) = sigmoid(-c).

Forward hooks multiply the input of each consumer (or the output of each modulation linear) by its
gates. A gate of 0 and cutting the unit are then the same: `W[:, keep] @ x[keep] == W @ (m * x)` for
a 0/1 mask m. With `means`, a closed gate replaces the unit's activation by its calibration mean
instead of 0; after pruning a bias supplies that constant. Where units are directions of a linear's
input, a hook multiplies the input's coordinates in their basis.
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

from ecodiff.models.libraries import without_compiling
from ecodiff.models.units import Port, Structure
from ecodiff.trajectory.directions import Basis

TEMPERATURE = 0.83
STRETCH = (-0.1, 1.1)


def sample_gate(
    logits: Tensor,
    u: Tensor,
    floor: float,
    temperature: float = TEMPERATURE,
    stretch: tuple[float, float] = STRETCH,
) -> Tensor:
    """Sample hard concrete gates from uniform noise (Louizos et al. 2018).

        gate = clip(sigmoid((log(u + d) - log(1 - u + d) + a) / b) * (z - g) + g, 0, 1)

    Args:
        logits: a, (units,), fp32.
        u: uniform noise (..., units) in [0, 1), fp32.
        floor: d >= 0, EcoDiff's noise floor. It bounds the noise to +-log((1 + d) / d); 0 is the
            hard concrete distribution itself.
        temperature: b > 0.
        stretch: (g, z), g < 0 and z > 1: the interval that the sigmoid is stretched to before it
            is clipped.

    Returns:
        fp32 (..., units) in [0, 1], differentiable in `logits`.
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

        c           = b * log(-g / z) - a          # gate > 0 when the noise exceeds c
        P(gate > 0) = 1 - clip((e^c (1 + d) - d) / (1 + e^c), 0, 1)

    With a floor d > 0 the noise is bounded, so P is exactly 1 for large logits and exactly 0 for
    small ones, and its gradient is 0 there. The arguments are those of `sample_gate`.

    Returns:
        Shape and dtype of `logits`, in [0, 1].
    """
    low, high = stretch
    threshold = temperature * math.log(-low / high) - logits  # gate > 0 <=> noise > threshold
    # (e^c (1 + d) - d) / (1 + e^c), written with a sigmoid because e^c overflows.
    return 1 - (torch.sigmoid(threshold) * (1 + 2 * floor) - floor).clamp(0, 1)


class Gates(nn.Module):
    """One gate per unit of every structure; logits are fp32 whatever the model's dtype.

    Gate values are kept from one call of `draw`, `set` or `open` to the next, so all denoising
    steps and their recomputation in the backward pass use the same sample.

    Args:
        structures: the structures to gate.
        first_logit: initial logit of all units.
        floor: the noise floor d >= 0.
        means: module name -> calibration mean (see `Calibration.means`) that replaces the input of
            a consumer, or the output of a modulation linear, where a gate is closed. Modules that
            are not named get 0.
        bases: linear name -> basis of its input, of structures whose units are its directions.
    """

    def __init__(
        self,
        structures: Iterable[Structure],
        first_logit: float = 3.0,
        floor: float = 0.0,
        means: Mapping[str, Tensor] = MappingProxyType({}),
        bases: Mapping[str, Basis] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.structures = list(structures)
        self.floor, self.means, self.bases = floor, dict(means), dict(bases)
        for s in self.structures:
            logits = torch.full((s.units,), first_logit, dtype=torch.float32)
            # torch forbids dots in parameter names.
            self.register_parameter(s.name.replace(".", "/"), nn.Parameter(logits))
        self._inputs = _by_module((s, port) for s in self.structures for port in s.consumers)
        self._outputs = _by_module(
            (s, port) for s in self.structures if not s.consumers for port in s.producers
        )
        self._directions = {s.directions_of: s.name for s in self.structures if s.directions_of}
        self._multipliers: dict[str, Tensor] = {}

    @property
    def logits(self) -> dict[str, nn.Parameter]:
        """Structure name -> fp32 parameter (units,)."""
        return {s.name: self.get_parameter(s.name.replace(".", "/")) for s in self.structures}

    def draw(
        self, batch: int, generator: torch.Generator | None = None, own: slice = slice(None)
    ) -> None:
        """Sample one gate per unit and prompt, used until the next `draw`, `set` or `open`.

        Args:
            batch: number of prompts n of all processes together; values are (n, units).
            generator: source of the noise. A CPU generator gives the same sample on every device.
            own: this process's rows of the n prompts. Noise is drawn for all n and the rest thrown
                away, so that all processes' generators stay in step.
        """
        device = generator.device if generator is not None else torch.device("cpu")
        values = {}
        for name, logits in self.logits.items():
            u = torch.rand(batch, len(logits), generator=generator, device=device)[own]
            values[name] = sample_gate(logits, u.to(logits.device), self.floor)
        self._hold(values)

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Use fixed gate values, such as a 0/1 mask; structures without a value stay fully open.

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
        """Use gates of 1 that record gradients: after a backward pass, `.grad` is d loss / d gate.

        Returns:
            Structure name -> fp32 (batch, units), leaf tensors of ones.
        """
        leaves = {
            name: torch.ones(batch, len(logits), device=logits.device, requires_grad=True)
            for name, logits in self.logits.items()
        }
        self._hold(leaves)
        return leaves

    def _hold(self, values: dict[str, Tensor]) -> None:
        """Store the gates as one multiplier per linear; several structures may share a linear."""
        device = next(iter(values.values())).device
        self.means = {module: mean.to(device) for module, mean in self.means.items()}
        self._multipliers = {
            module: _multiplier(ports, values)
            for module, ports in (self._inputs | self._outputs).items()
        } | {module: values[name] for module, name in self._directions.items()}

    @contextmanager
    def attached(self, denoiser: nn.Module) -> Iterator[None]:
        """Apply the current gate values to `denoiser` inside the context, by forward hooks.

        Inputs x of consumers and outputs x of modulation linears become gate * x +
        (1 - gate) * mean, in the dtype of x; the mean is 0 where `means` names none. The batch of x
        must be k * n: the n prompts of the gates for each of k guidance branches (unconditional,
        conditional), one branch after the other. Gates of a single prompt fit any batch. The hooks
        are removed on exit, also after an error.

        Raises:
            RuntimeError: in the forward pass: no gate values yet, or a batch that is no multiple
                of n.
        """
        handles = []
        try:
            for module in [*self._inputs, *self._directions]:
                linear = denoiser.get_submodule(module)
                handles.append(linear.register_forward_pre_hook(partial(self._gate_input, module)))
            for module in self._outputs:
                linear = denoiser.get_submodule(module)
                handles.append(linear.register_forward_hook(partial(self._gate_output, module)))
            with without_compiling():
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
        """gate * x + (1 - gate) * mean for x (k * n, ..., columns) and the gates (n, columns); the
        same of x's coordinates where units are directions."""
        if name not in self._multipliers:
            raise RuntimeError("gates have no values: draw() or set() them before the model runs")
        kind = torch.float32 if name in self._directions else x.dtype
        gate = self._multipliers[name].to(x.device, kind)
        prompts, covered = gate.shape
        branches, rest = divmod(len(x), prompts)
        if rest:
            raise RuntimeError(f"{name}: batch {len(x)} is no multiple of {prompts} drawn prompts")
        # Columns that no structure owns are never gated: those after the last gated column get ones
        # here, the others are ones already.
        gate = functional.pad(gate, (0, x.shape[-1] - covered), value=1.0)
        if prompts > 1:
            gate = gate.repeat(branches, 1)
        gate = gate.view(len(gate), *[1] * (x.ndim - 2), -1)
        if name in self._directions:
            return self.bases[name].gated(x, gate)
        if name not in self.means:
            return x * gate
        return torch.lerp(self.means[name].to(x.device, x.dtype), x, gate)

    def expected_sparsity(self, total_parameters: int) -> dict[str, Tensor]:
        """Expected share of `total_parameters` that closed gates remove, by kind of structure.

        Returns:
            Kind -> sum over its units of P(gate = 0) * unit parameters / `total_parameters`: fp32
            scalar, differentiable in the logits. The sum over kinds is the expected sparsity.
        """
        return self.shares(
            lambda logits: 1 - open_probability(logits, self.floor), total_parameters
        )

    def shares(
        self, closed: Callable[[Tensor], Tensor], total_parameters: int
    ) -> dict[str, Tensor]:
        """Share of `total_parameters` that the units of each kind hold, weighted by `closed`.

        Args:
            closed: maps logits (units,) to a weight for each unit (units,), such as the
                probability that its gate is closed.
            total_parameters: of the denoiser.

        Returns:
            Kind -> fp32 scalar.
        """
        found: dict[str, Tensor] = {}
        logits = self.logits
        for s in self.structures:
            removed = closed(logits[s.name]).sum() * s.unit_parameters
            if s.overhead:  # what is gone does not pay at first, but one more brings that nearer
                removed = removed - removed.detach().clamp(max=s.overhead)
            found[s.kind] = found.get(s.kind, 0) + removed / total_parameters
        return found


def _by_module(
    ports: Iterable[tuple[Structure, Port]],
) -> dict[str, list[tuple[Structure, Port]]]:
    modules: dict[str, list[tuple[Structure, Port]]] = {}
    for structure, port in ports:
        modules.setdefault(port.module, []).append((structure, port))
    return modules


def _multiplier(ports: list[tuple[Structure, Port]], values: dict[str, Tensor]) -> Tensor:
    """Expand gates (n, units) to the columns that the units own; 1 elsewhere: (n, columns)."""
    size = max(max(port.offsets) + s.units * port.width for s, port in ports)
    gates = [values[s.name].repeat_interleave(port.width, dim=1) for s, port in ports]
    multiplier = gates[0].new_ones(len(gates[0]), size)
    for (s, port), gate in zip(ports, gates, strict=True):
        columns = s.columns(port, torch.arange(s.units, device=gate.device))
        multiplier = multiplier.index_copy(1, columns, gate.repeat(1, len(port.offsets)))
    return multiplier
