"""The main table: one row a variant, with all that was measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from ecodiff.config.sections import EvaluateSettings
from ecodiff.report.results import Results
from ecodiff.report.style import COST, EXACT, QUALITY, TARGET, Quantity, method
from ecodiff.runtime.artifacts import write_text
from ecodiff.runtime.errors import UserError

SIZE, WORK = COST[:3], COST[3:]
COLUMNS = (TARGET, EXACT, *SIZE, *QUALITY, *WORK)
SHORT = [one for one in QUALITY if one.key not in ("kid", "cmmd")]  # what FID says too
CONSOLE = (TARGET, EXACT, COST[1], *SHORT, COST[3])  # what fits a terminal's width
WIDTH = 120  # of the printed table, where output is no terminal or a narrower one


def main_table(results: Results) -> pd.DataFrame:
    """The main table, values as the stages wrote them.

    Returns:
        model, variant, method (str); target_sparsity and sparsity (shares of the denoiser's
        parameters; exact by the parameters counted, else by the mask) and the `QUALITY` and `COST`
        columns of `style`. What was not measured is NaN; PSNR of identical pictures is infinite.

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
    """A paragraph for below a table: each metric's library and settings."""
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
    table: pd.DataFrame, folder: Path, published: Path | None = None, notes: str = ""
) -> None:
    """Writes `main.csv` (raw values), `main.md` and `main.tex` (units, rounded).

    Args:
        table: of `main_table`.
        folder: where to.
        notes: a paragraph below ours in `main.md`.
        published: csv of published results, shown below ours in `main.md`.

    Raises:
        UserError: there is no such csv.
    """
    shown = readable(table, _measured(table, COLUMNS))
    text = f"# Results\n\n{markdown(shown)}\n{notes}"
    if published is not None:
        try:
            theirs = pd.read_csv(published, dtype=str).fillna("-")
        except (OSError, ValueError) as error:
            raise UserError(f"report.published: {published} cannot be read: {error}") from error
        text += f"\n# Published results, for comparison\n\n{markdown(theirs)}"
    write_text(folder / "main.csv", table.to_csv(index=False))
    write_text(folder / "main.md", text)
    write_text(folder / "main.tex", _latex(shown))


def readable(table: pd.DataFrame, columns: Sequence[Quantity]) -> pd.DataFrame:
    """Model, method and the given columns as text, under headers with units."""
    shown = table[["model", "method"]].rename(columns=str.capitalize)
    for column in columns:
        shown[column.title] = [column.show(value) for value in table[column.key]]
    return shown


def print_table(table: pd.DataFrame, console: Console | None = None) -> None:
    """Prints the main table's most telling columns, a block a model."""
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
    """A table of text as GitHub shows it."""
    lines = [table.columns, ["---"] * table.shape[1], *table.itertuples(index=False)]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(value: object) -> str:
    """A cell's text; a bar would end it, and a new line the table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _latex(table: pd.DataFrame) -> str:
    """A booktabs table; arrows and powers as LaTeX has them."""
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
