"""Files of rows: text, csv, tsv, JSON lines, parquet. Imports no torch.

A row comes with where it stands, such as "line 3" or "row 2", for those who have to mend it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ecodiff.runtime.errors import UserError, first_line, listed
from ecodiff.runtime.reading import read_columns, read_lines, read_text

Fields = Iterator[tuple[int, list[str]]]  # the line that a row starts on, and what is in it


class Table:
    """A csv or tsv file with a header: each row has as many fields as there are columns.

    Attributes:
        header: the names of the columns.
    """

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Raises:
            UserError: the file is missing, not UTF-8 or empty.
        """
        self._path = path
        self._rows = _tab_separated(path) if path.suffix.lower() == ".tsv" else _csv(path)
        self.header = next(([*map(str.strip, row)] for _, row in self._rows if any(row)), [])
        if not self.header:
            raise UserError(f"{path}: is empty")

    def column(self, name: str) -> int:
        """Where in the rows a column is; UserError when it is missing or there twice."""
        if self.header.count(name) == 1:
            return self.header.index(name)
        wrong = "two columns" if name in self.header else "no column"
        raise UserError(f"{self._path}: {wrong} {name!r}; there are {listed(self.header)}")

    def rows(self) -> Iterator[tuple[str, list[str]]]:
        """The rows under the header, blank ones with blank fields.

        Raises:
            UserError: a row has too few or too many fields, or quotes that don't fit.
        """
        width = len(self.header)
        for line, row in self._rows:
            if len(row) != width and any(map(str.strip, row)):
                raise UserError(
                    f"{self._path}, line {line}: fields: {len(row)}, columns: {width};"
                    " is there a separator within a text? A csv has such texts in quotes"
                )
            yield f"line {line}", row if len(row) == width else [""] * width


def _csv(path: Path) -> Fields:
    """Rows of comma-separated fields, in quotes where they hold commas, quotes or lines."""
    reader = csv.reader(
        io.StringIO(read_text(path), newline="\n"), strict=True, skipinitialspace=True
    )
    while True:
        line = reader.line_num + 1
        try:
            yield line, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{path}, line {line}: {first_line(error)}; is a quote missing?"
            ) from None


def _tab_separated(path: Path) -> Fields:
    """Rows of tab-separated fields as they are written, but for quotes around a whole field."""
    for line, text in enumerate(read_lines(path), start=1):
        yield line, [_unquoted(field.strip()) for field in text.split("\t")]


def _unquoted(field: str) -> str:
    inner = field[1:-1].replace('""', "")
    if len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner:
        return field[1:-1].replace('""', '"')
    return field  # "G I G G L E" painted on a wall: a quote of the text's own


def _texts(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    return ((f"line {n}", line) for n, line in enumerate(read_lines(path), start=1))


def _table(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    table = Table(path)
    place = table.column(column)
    return ((where, row[place]) for where, row in table.rows())


def _json_lines(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    for where, line in _texts(path, column):
        if not line.strip():
            yield where, None
            continue
        found = parse_json(line, f"{path}, {where}")
        if not isinstance(found, dict):
            raise UserError(f"{path}, {where}: is no JSON object")
        if column not in found:
            raise UserError(f"{path}, {where}: no key {column!r}; there are {listed(found)}")
        yield where, found[column]


def _parquet(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    (values,) = read_columns(path, [column])
    return ((f"row {n}", value) for n, value in enumerate(values, start=1))


def parse_json(text: str, where: str) -> Any:
    """What a JSON text says; UserError, which begins with `where`, when it is none."""
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()
        return found
    except UnicodeError:  # such as "\\ud800"
        raise UserError(f"{where}: half a character, as an escape of JSON, is no text") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {first_line(error)}") from None


# The values of one column, each with where it stands; a text file has but one.
FORMATS: dict[str, Callable[[Path, str], Iterator[tuple[str, Any]]]] = {
    ".txt": _texts,
    ".csv": _table,
    ".tsv": _table,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
