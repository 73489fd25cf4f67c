"""Read settings from YAML, and say of each thing that is wrong where it stands.

Imports no torch.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ecodiff.runtime.errors import UserError
from ecodiff.runtime.reading import read_text

S = TypeVar("S", bound=BaseModel)
Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """The contents of a YAML file or text, and where they stand.

    Attributes:
        values: what it says.
        name: of the file or option; empty for values without a text.
        lines: path of keys -> number of its line.
        under: the document that these values were put over, if any.
    """

    values: Any
    name: str = ""
    lines: Mapping[Path_, int] = field(default_factory=dict)
    under: Document | None = None

    def where(self, path: Path_) -> str:
        """What begins a message about a key: file, line and key, as far as they are known."""
        home, known = self._home(path)
        place = f"{home.name}, line {home.lines[known]}" if known else home.name
        return ": ".join(part for part in (place, ".".join(map(str, path))) if part)

    def line(self, path: Path_) -> int:
        """The line of a key, or of what it lies in; 0 where none is known."""
        home, known = self._home(path)
        return home.lines.get(known, 0)

    def _home(self, path: Path_) -> tuple[Document, Path_]:
        """The document that says most of a path of keys, and how much of it."""
        known = (path[:n] for n in range(len(path), 0, -1) if path[:n] in self.lines)
        mine = next(known, ())
        if self.under is not None:
            below, theirs = self.under._home(path)
            if len(theirs) > len(mine):
                return below, theirs
        return self, mine


def read_document(source: str | Path, name: str = "") -> Document:
    """A YAML file (.yaml, .yml or .json), or YAML text.

    Args:
        source: path of the file, or the text.
        name: what messages call a text.

    Raises:
        UserError: it cannot be read, is no YAML, or has a key twice; both lines are named.
    """
    text = str(source)
    is_file = isinstance(source, Path) or Path(text).suffix in {".yaml", ".yml", ".json"}
    if is_file:
        name, text = str(source), read_text(Path(source))
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(_not_yaml(error, name)) from None
    except RecursionError:
        raise UserError(f"{name or 'settings'}: nested too deeply") from None
    lines: dict[Path_, int] = {}
    problems = [*_places(node, (), lines)] if node is not None else []
    document = Document(values, name, lines if is_file else {})
    if problems:
        raise UserError("\n".join(f"{name}: {problem}".removeprefix(": ") for problem in problems))
    return document


def read_settings(
    kind: type[S],
    source: str | Path | Mapping[str, Any] | Document | None,
    base: Mapping[str, Any] | None = None,
    name: str = "",
) -> S:
    """Settings of a section from a mapping, a YAML file or YAML text; None gives the defaults.

    Args:
        kind: the section's class.
        source: what to read.
        base: values that `source` is put over, key by key, instead of over the defaults.
        name: what messages call a text, such as the option that it was given by.

    Raises:
        UserError: with a line for each thing that is wrong.
    """
    if isinstance(source, str | Path):
        source = read_document(source, name)
    document = source if isinstance(source, Document) else Document(source, name)
    changes = {} if document.values is None else document.values
    try:
        return kind.model_validate(changes if base is None else merged(base, changes))
    except ValidationError as error:
        raise UserError("\n".join(explain(error, kind, document))) from None


def merged(base: Any, changes: Any) -> Any:
    """`base` with the keys of `changes` put over it, section by section."""
    if not isinstance(base, Mapping) or not isinstance(changes, Mapping):
        return base if changes is None else changes
    return {**base, **{key: merged(base.get(key), value) for key, value in changes.items()}}


def explain(error: ValidationError, kind: type[BaseModel], document: Document) -> list[str]:
    """A line for each thing that is wrong: where it stands, how it is wrong, what is allowed."""
    found: dict[str, int] = {}
    errors = error.errors()
    for one in errors:
        # A list counts only its good items: where there are bad ones, they are what is wrong.
        if one["type"] == "too_short" and any(
            _within(other["loc"], one["loc"]) for other in errors
        ):
            continue
        path = _own_path(one["loc"], document)
        line = f"{document.where(path)}: {_message(one, kind)}".removeprefix(": ")
        found.setdefault(line, document.line(path))
    return sorted(found, key=lambda line: found[line])


def shown(value: Any) -> str:
    """A value as messages show it: at most about sixty characters, in one line."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    return short.repr(value)


def _own_path(location: Path_, document: Document) -> Path_:
    """The path of a key in the file: models inherit the shared sections, where a mistake is made
    once and found in each."""
    match location:
        case ("models", _, "mask" | "retrain" as section, *rest):
            shared = (section, *rest)
            if _has(document.values, shared) and not _has(document.values, location):
                return shared
    return location


def _within(location: Path_, outer: Path_) -> bool:
    return len(location) > len(outer) and location[: len(outer)] == outer


def _has(values: Any, path: Path_) -> bool:
    """Whether there is something at a path of keys."""
    for key in path:
        try:
            values = values[key]
        except (TypeError, KeyError, IndexError):
            return False
    return True


def _message(error: Mapping[str, Any], kind: type[BaseModel]) -> str:
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        allowed = _allowed_keys(kind, error["loc"][:-1])
        close = difflib.get_close_matches(str(error["loc"][-1]), allowed, n=1)
        hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(allowed)}"
        return f"unknown key; {hint}"
    if error["type"] == "too_short":
        return "at least one item is needed"
    if error["type"] == "missing":
        return "this key is missing"
    if error["type"] == "value_error":
        return message
    message = re.sub(r"^Input should", "should", message).replace("valid dictionary", "mapping")
    return f"{re.sub(r' or instance of .*', '', message)}, not {shown(error['input'])}"


def _places(node: yaml.Node, path: Path_, lines: dict[Path_, int]) -> Iterator[str]:
    """Note where each key stands; what is said of keys that stand there twice."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                yield f"the key {name} stands twice, in lines {seen[name]} and {line}"
            seen[name] = lines[(*path, name)] = line
            yield from _places(value, (*path, name), lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, index)] = value.start_mark.line + 1
            yield from _places(value, (*path, index), lines)


def _not_yaml(error: yaml.YAMLError, name: str) -> str:
    mark = getattr(error, "problem_mark", None)
    place = ", ".join(part for part in (name, f"line {mark.line + 1}" if mark else "") if part)
    problem = getattr(error, "problem", None) or str(error)
    return f"{place}: not YAML: {' '.join(str(problem).split())}".removeprefix(": ")


def _allowed_keys(kind: type[BaseModel], location: Iterable[int | str]) -> list[str]:
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
