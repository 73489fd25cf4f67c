"""Read settings from YAML and say in one line what is wrong with them. Imports no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ecodiff.runtime.errors import UserError
from ecodiff.runtime.reading import read_text

S = TypeVar("S", bound=BaseModel)


def read_settings(
    kind: type[S],
    source: str | Path | Mapping[str, Any] | None,
    base: Mapping[str, Any] | None = None,
) -> S:
    """Settings of a section from a mapping, a YAML file or YAML text; None gives the defaults.

    Args:
        kind: the section's class.
        source: what to read.
        base: values that `source` is put over, key by key, instead of over the defaults.

    Raises:
        UserError: with one line on the first thing that is wrong.
    """
    where = ""
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix in {".yaml", ".yml", ".json"}:
            where = f"{path}: "
            source = read_text(path)
        try:
            source = yaml.safe_load(str(source))
        except yaml.YAMLError as error:
            raise UserError(f"{where}not YAML: {' '.join(str(error).split())}") from None
    try:
        changes = {} if source is None else source
        return kind.model_validate(changes if base is None else merged(base, changes))
    except ValidationError as error:
        raise UserError(where + explain(error, kind)) from None


def merged(base: Any, changes: Any) -> Any:
    """`base` with the keys of `changes` put over it, section by section."""
    if not isinstance(base, Mapping) or not isinstance(changes, Mapping):
        return base if changes is None else changes
    return {**base, **{key: merged(base.get(key), value) for key, value in changes.items()}}


def explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """One line: the key that is wrong, how, and what is allowed."""
    # An error in a shared section shows in every model that inherits it: name the section.
    first, *others = sorted(error.errors(), key=lambda one: len(one["loc"]))
    path = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        allowed = _allowed_keys(kind, first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), allowed, n=1)
        hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(allowed)}"
        message = f"unknown key; {hint}"
    elif first["type"] == "missing":
        message = "this key is missing"
    elif first["type"] != "value_error":
        message = re.sub(r"^Input should", "should", message).replace("valid dictionary", "mapping")
        message = f"{re.sub(r' or instance of .*', '', message)}, not {first['input']!r}"
    more = f" (and {len(others)} more)" if others else ""
    return f"{path + ': ' if path else ''}{message}{more}"


def _allowed_keys(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at a location of pydantic's error."""
    for part in location:
        annotation = kind.model_fields[str(part)].annotation if part in kind.model_fields else None
        inner = _first_model(annotation)
        kind = inner if inner is not None else kind
    return list(kind.model_fields)


def _first_model(annotation: Any) -> type[BaseModel] | None:
    """The first settings class within an annotation such as `dict[str, X] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_first_model(argument) for argument in get_args(annotation))
    return next((model for model in found if model is not None), None)
