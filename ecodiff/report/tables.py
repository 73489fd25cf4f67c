"""The main table: one row per variant, with everything that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from ecodiff.config.sections import EvaluateSettings
from ecodiff.report.results import Results
from ecodiff.report.style import COST, EXACT, QUALITY, TARGET, Quantity, method
from ecodiff.runtime.artifacts import write_text
from ecodiff.runtime.errors import UserError, first_line
from ecodiff.runtime.reading import read_text

SIZE, WORK = COST[:3], COST[3:]
COLUMNS = (TARGET, EXACT, *SIZE, *QUALITY, *WORK)
SHORT = [one for one in QUALITY if one.key not in ("kid", "cmmd")]  # both measure the same as FID
CONSOLE = (TARGET, EXACT, COST[1], *SHORT, COST[3])  # what fits a terminal's width
WIDTH = 120  # characters of the printed table at least, also without a terminal or in a narrow one


def main_table(results: Results) -> pd.DataFrame:
    """The main table, one row per model and variant, values as the stages wrote them.

    Returns:
        model, variant, method (str); target_sparsity and sparsity (shares of the denoiser's
        parameters, 0 to 1; the latter is counted on the pruned model where efficiency was measured,
        otherwise the mask's exact sparsity) and the `QUALITY` and `COST` columns of `style`. What
        was not measured is NaN; PSNR of identical images is infinite.

    Raises:
        UserError: a file is missing or damaged.
    """
    rows = []
    for model in results.variants:
        measured = results.efficiency(model)
        for variant in results.of(model):
            judged = results.quality(model, variant)
            if judged["psnr"] is None:  # JSON has no infinity
                judged["psnr"] = np.inf
            cost = measured[variant.name] if measured else {}
            exact = results.sparsity(model, variant)
            if measured and "dense" in measured:
                dense = measured["dense"]["denoiser_parameters"]
                exact = 1 - cost["denoiser_parameters"] / dense
            rows.append(
                {
                    "model": model,
                    "variant": variant.name,
                    "method": method(variant),
                    "target_sparsity": variant.sparsity,
                    "sparsity": exact,
                    **{one.key: judged[one.key] for one in QUALITY},
                    **{one.key: cost.get(one.key) for one in COST},
                }
            )
    names = ["model", "variant", "method", *(column.key for column in COLUMNS)]
    return pd.DataFrame(rows, columns=names)


def how_measured(settings: EvaluateSettings) -> str:
    """A paragraph for below a table: the library and settings of each metric."""
    clip = f"open_clip's {settings.clip_model}"
    clip += f" ({settings.clip_pretrained})" if settings.clip_pretrained else ""
    features = "Inception's 2,048 pool features" if settings.features == "inception" else clip
    return (
        f"FID and KID: torchmetrics on {features}; KID is unbiased, so it may be below zero. CMMD:"
        " Gaussian kernel of bandwidth 10 on normalised embeddings, times 1,000; CLIP score: mean"
        f" cosine; both by {clip}. SSIM and PSNR: torchmetrics, against the dense model. Relative"
        " latent error: mean((z0' - z0)^2) / var(z0) against the dense model's final latents; its"
        " median is over pictures. Scene accuracy: the exact checker of ShapeWorld captions.\n"
    )


def write_tables(
    table: pd.DataFrame,
    folder: Path,
    published: Path | None = None,
    notes: str = "",
    mark: str = "",
) -> None:
    """Write `main.csv` (raw values), `main.md` and `main.tex` (rounded, with units).

    Args:
        table: as `main_table` returns it.
        folder: where to write.
        published: csv file of published results, shown below our table in `main.md`.
        notes: a paragraph below our table in `main.md`.
        mark: the hash of all that the table was made of, which each file carries; "": none.

    Raises:
        UserError: the file of published results cannot be read.
    """
    shown = readable(table, _measured(table, COLUMNS))
    text = f"# Results\n\n{markdown(shown)}\n{notes}"
    text += f"\nMade of {mark}; `ecodiff explain` tells of what.\n" if mark else ""
    latex = f"% made of {mark}\n{_latex(shown)}" if mark else _latex(shown)
    table = table.assign(made_of=mark) if mark else table
    if published is not None:
        try:
            theirs = pd.read_csv(StringIO(read_text(published)), dtype=str).fillna("-")
        except ValueError as error:
            raise UserError(f"report.published: {published}: {first_line(error)}") from None
        text += f"\n# Published results, for comparison\n\n{markdown(theirs)}"
    write_text(folder / "main.csv", table.to_csv(index=False))
    write_text(folder / "main.md", text)
    write_text(folder / "main.tex", latex)


def readable(table: pd.DataFrame, columns: Sequence[Quantity]) -> pd.DataFrame:
    """Model, method and the given quantities as text, with units in the headers."""
    shown = table[["model", "method"]].rename(columns=str.capitalize)
    for column in columns:
        shown[column.title] = [column.show(value) for value in table[column.key]]
    return shown


def print_table(table: pd.DataFrame, console: Console | None = None) -> None:
    """Print the columns of the main table that fit a terminal, one block per model."""
    console = console or Console(width=max(Console().width, WIDTH))
    columns = _measured(table, CONSOLE)
    for model, rows in table.groupby("model", sort=False):
        printed = Table(title=f"\n{model}", title_style="bold", box=None, padding=(0, 1, 0, 0))
        printed.add_column("", no_wrap=True)
        for column in columns:
            printed.add_column(column.short, justify="right", no_wrap=True)
        for _, row in rows.iterrows():
            printed.add_row(row["method"], *(column.show(row[column.key]) for column in columns))
        console.print(printed)


def _measured(table: pd.DataFrame, columns: Sequence[Quantity]) -> list[Quantity]:
    return [column for column in columns if table[column.key].notna().any()]


def markdown(table: pd.DataFrame) -> str:
    """A table of text in GitHub's Markdown."""
    lines = [table.columns, ["---"] * table.shape[1], *table.itertuples(index=False)]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(value: object) -> str:
    """A cell's text; a bar would end it, and a new line the table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _latex(table: pd.DataFrame) -> str:
    """A LaTeX table (booktabs), with arrows and powers as LaTeX commands."""
    text = table.to_latex(index=False, escape=True, column_format="ll" + "r" * (table.shape[1] - 2))
    signs = {
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "10⁻³": r"$10^{-3}$",
        "∞": r"$\infty$",
    }
    for sign, command in signs.items():
        text = text.replace(sign, command)
    return text
