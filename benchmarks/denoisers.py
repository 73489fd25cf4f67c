"""Which denoisers of diffusers are understood: `python benchmarks/denoisers.py DIFFUSERS`.

It prints docs/denoisers.md. DIFFUSERS is a checkout of diffusers, whose tests bring a small config
and inputs for each of their models. Each is pruned to a third of its units, to one, to none and to
a mixture, and has to equal the masked model, both as it was cut and as it is read back.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import pandas as pd
import torch
from torch import Tensor, nn

from ecodiff.models.pruned import pruned_class
from ecodiff.models.structures import (
    count_parameters,
    discover,
    maskable_share,
    modulation_linears,
)
from ecodiff.models.units import Structure
from ecodiff.prune.narrow import narrow
from ecodiff.report.tables import markdown
from ecodiff.runtime.errors import UserError
from ecodiff.trajectory.gates import Gates

FOLDERS = ("transformers", "unets")
KINDS = ("heads", "neurons", "modulation")
CLOSE = 1e-5  # largest deviation, relative to the largest value of the masked model's output


def cases(checkout: Path) -> Iterator[tuple[type, dict[str, Any], dict[str, Any]]]:
    """Class, config and inputs of each model that the tests of a checkout build, once."""
    sys.path.insert(0, str(checkout))
    seen = set()
    for folder in FOLDERS:
        for file in sorted((checkout / "tests/models" / folder).glob("test_*.py")):
            try:
                module = importlib.import_module(f"tests.models.{folder}.{file.stem}")
            except ImportError as error:
                print(f"{file.name}: {error}", file=sys.stderr)
                continue
            # Not those that it imports: models themselves, of the real size.
            own = [
                c for c in vars(module).values() if getattr(c, "__module__", "") == module.__name__
            ]
            for case in filter(inspect.isclass, own):
                found = _case(case)
                if found and found[0].__name__ not in seen:
                    seen.add(found[0].__name__)
                    yield found


def _case(case: type) -> tuple[type, dict[str, Any], dict[str, Any]] | None:
    """What a class of tests builds and runs; None where it is no such class."""
    try:
        tests = case()
        model = tests.model_class
        if hasattr(tests, "get_init_dict"):
            config, inputs = tests.get_init_dict(), tests.get_dummy_inputs()
        else:
            config, inputs = tests.prepare_init_args_and_inputs_for_common()
    except Exception:  # whatever their classes of other kinds raise
        return None
    return (model, config, inputs) if inspect.isclass(model) else None


def outcome(kind: type, config: dict[str, Any], inputs: dict[str, Any]) -> list[str]:
    """`understood`, or how it is refused, or where pruned and masked differ; and the share of the
    parameters that each kind of structure has."""
    torch.manual_seed(0)
    model = kind(**config).eval().requires_grad_(False)
    for parameter in model.parameters():  # zeros would hide what is cut
        if parameter.ndim < 2 or not parameter.any():
            parameter += 0.1 * torch.randn(parameter.shape)
    try:
        structures = discover(model)
    except UserError as error:
        layers = str(error).partition("not understood: ")[2].partition(" (see")[0]
        return [f"refused: {layers}", *("" for _ in KINDS)]
    wrong = [
        f"{how} by {off:.0e}"
        for how in ("a third", "one", "none", "a mixture")
        if (off := difference(model, structures, kept(structures, how), inputs)) > CLOSE
    ]
    total = count_parameters(model)
    found = (maskable_share([s for s in structures if s.kind == k], total) for k in KINDS)
    word = f"**wrong**: {', '.join(wrong)}" if wrong else "understood"
    return [word, *(f"{share:.0%}" for share in found)]


def kept(structures: Sequence[Structure], how: str) -> dict[str, Tensor]:
    """Which units stay."""
    draw, stays = torch.Generator().manual_seed(0), {}
    for place, s in enumerate(structures):
        third = max(1, s.units // 3)
        count = {"a third": third, "one": 1, "none": 0}.get(how, (0, 1, third)[place % 3])
        stays[s.name] = torch.randperm(s.units, generator=draw)[:count].sort().values
    return stays


def difference(
    model: nn.Module,
    structures: Sequence[Structure],
    stays: Mapping[str, Tensor],
    inputs: dict[str, Any],
) -> float:
    """Between the masked model, the pruned one and the pruned one that was read back."""
    biases = {name: model.get_submodule(name).bias for name in modulation_linears(structures)}
    gates = Gates(structures, means={n: b for n, b in biases.items() if b is not None})
    gates.set({s.name: torch.zeros(s.units).index_fill(0, stays[s.name], 1) for s in structures})
    with gates.attached(model):
        masked = outputs(model, inputs)
    small = copy.deepcopy(model)
    record = narrow(small, structures, stays)
    again = pruned_class(type(model)).from_config({**model.config, "pruned": record}).eval()
    again.load_state_dict(small.state_dict())
    return max(
        float((one - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9))
        for pruned in (small, again)
        for one, wanted in zip(outputs(pruned, inputs), masked, strict=True)
    )


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """All tensors that a model returns."""
    torch.manual_seed(0)
    with torch.no_grad():
        return list(_tensors(model(**copy.deepcopy(inputs))))


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, Mapping):
        for one in found.values():
            yield from _tensors(one)
    elif isinstance(found, list | tuple):
        for one in found:
            yield from _tensors(one)


def main() -> None:
    """Print the page."""
    warnings.filterwarnings("ignore")
    diffusers.logging.set_verbosity_error()
    rows = []
    for kind, config, inputs in cases(Path(sys.argv[1]).resolve()):
        print(kind.__name__, file=sys.stderr, flush=True)
        rows.append([kind.__name__, *outcome(kind, config, inputs)])
    head = ["class", "", *KINDS]
    found = pd.DataFrame(sorted(rows), columns=head)
    count = (found[""] == "understood").sum()
    print(
        "# Denoisers of diffusers\n\n"
        f"Of {len(found)} denoisers that diffusers' tests build, {count} are understood: pruned to"
        " a third of their units, to one,\nto none and to a mixture, they equal the masked model"
        f" within {CLOSE:.0e} of the largest value, also read back\nfrom their config. The others"
        " are refused, with the layers that are not understood. Beside them are the shares\nof"
        " parameters that can go, of the small models of those tests: which kinds there are is"
        " what they tell.\nRecognition goes by linears, not by names of classes"
        " ([families](families.md)).\n\n"
        f"`python benchmarks/denoisers.py DIFFUSERS`, diffusers {diffusers.__version__},"
        f" {date.today()}.\n\n{markdown(found)}",
        end="",
    )


if __name__ == "__main__":
    main()
