"""Pages for a browser, each one file that needs no server and no network. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader

from ecodiff.runtime.artifacts import write_text

TEXTS = ("Model", "Method")  # columns of tables that hold no numbers


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page of a template in `ecodiff/report/templates`; text is escaped."""
    pages = Environment(loader=PackageLoader("ecodiff.report", "templates"), autoescape=True)
    pages.policies["json.dumps_kwargs"] = {"sort_keys": False}  # models in the order of the config
    write_text(path, pages.get_template(template).render(values))


def write_table(
    path: Path, title: str, table: pd.DataFrame, notes: str, texts: Collection[str] = TEXTS
) -> None:
    """Write a table of text that sorts by the column whose name is clicked.

    Args:
        path: of the page.
        title: above the table.
        table: as it is shown.
        notes: a paragraph below it.
        texts: columns that hold no numbers.
    """
    rows = table.itertuples(index=False)
    write_page(
        path, "table.html", title=title, columns=[*table], rows=rows, notes=notes, texts=texts
    )
