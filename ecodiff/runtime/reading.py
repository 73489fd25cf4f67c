"""Files as people have them: bytes, UTF-8 text, columns of parquet; or one line on why not.

Imports no torch.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ecodiff.runtime.errors import UserError, first_line, listed


def read_bytes(path: str | Path) -> bytes:
    """A file's bytes.

    Raises:
        UserError: there is no such file, it is a folder, or it may not be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        why = "there is no such file"
    except IsADirectoryError:
        why = "is a folder, not a file"
    except PermissionError:
        why = "no permission to read it"
    except (OSError, ValueError) as error:  # such as a name that is too long
        why = f"cannot be read: {getattr(error, 'strerror', None) or first_line(error)}"
    raise UserError(f"{path}: {why}")


def read_text(path: str | Path) -> str:
    r"""The text of a UTF-8 file, without its byte order mark; `\r\n` becomes `\n`.

    Raises:
        UserError: see `read_bytes`; or it is not UTF-8: the line and how to convert it.
    """
    data = read_bytes(path).removeprefix(codecs.BOM_UTF8)
    wide = b"\0" in data or data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode()
        bad = data.find(0)  # plain letters in UTF-16 are valid UTF-8, with a zero byte each
    except UnicodeDecodeError as error:
        text, bad = "", error.start
    if bad >= 0:
        line, encoding = data.count(b"\n", 0, bad) + 1, "UTF-16" if wide else "CP1252"
        raise UserError(
            f"{path}, line {line}: not UTF-8; convert the file, such as by"
            f" iconv -f {encoding} -t UTF-8"
        )
    return text.replace("\r\n", "\n")


def read_lines(path: str | Path) -> list[str]:
    r"""The lines of a UTF-8 file, without their ends; `\n` alone ends a line.

    Raises:
        UserError: see `read_text`.
    """
    *lines, last = read_text(path).split("\n")
    return [*lines, last] if last else lines


def read_columns(path: str | Path, names: Sequence[str]) -> list[list[Any]]:
    """Columns of a parquet file as Python values, None where there is none.

    Raises:
        UserError: see `read_bytes`; or it is not parquet, or has no such column.
    """
    import pyarrow
    from pyarrow import parquet

    data = pyarrow.BufferReader(read_bytes(path))
    try:
        file = parquet.ParquetFile(data)
        there = file.schema_arrow.names
        table = file.read(columns=[name for name in names if name in there])
        found = {name: table.column(name).to_pylist() for name in table.column_names}
    except Exception as error:  # what is raised for a damaged file is not said anywhere
        raise UserError(f"{path}: not a whole parquet file: {first_line(error)}") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{path}: no column {missing[0]!r}; there are {listed(there)}")
    return [found[name] for name in names]
