"""The main table: one row per variant, with everything that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from ecodiff.config.sections import EvaluateSettings
from ecodiff.config.variants import Variant
from ecodiff.report.pages import write_table
from ecodiff.report.results import Results
from ecodiff.report.style import COST, EXACT, QUALITY, TARGET, Quantity, method, quality_of
from ecodiff.runtime.artifacts import write_text
from ecodiff.runtime.errors import UserError, first_line
from ecodiff.runtime.reading import read_text

SIZE, WORK = COST[:3], COST[3:]
SHORT = [one for one in QUALITY if one.key not in ("kid", "cmmd")]  # both measure the same as FID
CONSOLE = (TARGET, EXACT, COST[1], *SHORT, COST[3])  # what fits a terminal's width
WIDTH = 120  # characters of the printed table at least, also without a terminal or in a narrow one


def main_table(results: Results) -> pd.DataFrame:
    """The main table, one row per model and variant, values as the stages wrote them.

    Returns:
        model, variant, method (str); target_sparsity and sparsity (shares of the denoiser's
        parameters, 0 to 1; the latter is counted on the pruned model where efficiency was measured,
        otherwise the mask's exact sparsity) and the quality and cost columns of `columns_of`. What
        was not measured is NaN; PSNR of identical images is infinite.

    Raises:
        UserError: a file is missing or damaged.
    """
    rows = []
    for model in results.variants:
        measured = results.efficiency(model)
        for variant in results.of(model):
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
                    **{one.key: cost.get(one.key) for one in COST},
                    **_judged(results, model, variant),
                }
            )
    columns = columns_of(results.sets)
    names = ["model", "variant", "method", *(column.key for column in columns)]
    extra = [f"{column.key}_{what}" for column in columns for what in ("se", "tied")]
    return pd.DataFrame(
        rows, columns=[*names, *(key for key in extra if any(key in row for row in rows))]
    )


def columns_of(sets: Sequence[str]) -> list[Quantity]:
    """The columns of the main table of a run that was judged on some prompt sets."""
    judged = [column for block in quality_of(sets).values() for column in block]
    return [TARGET, EXACT, *SIZE, *judged, *WORK]


def _judged(results: Results, model: str, variant: Variant) -> dict[str, Any]:
    """The metrics of a variant on all prompt sets, with what is known of their errors."""
    found: dict[str, Any] = {}
    for prompts, columns in quality_of(results.sets).items():
        judged = results.quality(model, variant, prompts)
        if judged["psnr"] is None:  # JSON has no infinity
            judged["psnr"] = np.inf
        errors = _uncertainty(results, model, variant, prompts)
        for one, column in zip(QUALITY, columns, strict=True):
            found[column.key] = judged[one.key]
            for what in ("se", "tied"):
                if f"{one.key}_{what}" in errors:
                    found[f"{column.key}_{what}"] = errors[f"{one.key}_{what}"]
    return found


def _uncertainty(results: Results, model: str, variant: Variant, prompts: str) -> dict[str, Any]:
    """Of each metric its standard error, and whether a better variant of the same sparsity may be
    better by chance alone."""
    rivals = [v for v in results.of(model) if v.percent == variant.percent]
    judged = {v: results.quality(model, v, prompts) for v in rivals}
    found: dict[str, Any] = {}
    for one in QUALITY:
        known = {
            v: (values[one.key], np.array(values["resampled"][one.key]))
            for v, values in judged.items()
            if one.key in values.get("resampled", {})
        }
        if variant not in known:
            continue
        best = (max if one.better == "higher" else min)(known, key=lambda v: known[v][0])
        (value, drawn), (top, of_best) = known[variant], known[best]
        gap = (drawn - of_best).std(ddof=1)
        found[f"{one.key}_se"] = float(drawn.std(ddof=1))
        found[f"{one.key}_tied"] = bool(best != variant and abs(value - top) <= 2 * gap)
    return found


def how_measured(settings: EvaluateSettings) -> str:
    """A paragraph for below a table: the library and settings of each metric."""
    clip = f"open_clip's {settings.clip_model}"
    clip += f" ({settings.clip_pretrained})" if settings.clip_pretrained else ""
    features = (
        f"Inception's 2,048 pool features, pictures resized as `{settings.resize}`"
        if settings.features == "inception"
        else clip
    )
    embedded = settings.cmmd_model or settings.clip_model
    if settings.cmmd_pretrained or (settings.cmmd_model is None and settings.clip_pretrained):
        embedded += f" ({settings.cmmd_pretrained or settings.clip_pretrained})"
    return (
        f"FID and KID on {features}; KID by torchmetrics' kernel, unbiased, so it may be below"
        " zero. CMMD: Gaussian kernel of bandwidth 10 on normalised embeddings by"
        f" {embedded}, times 1,000; CLIP score: mean cosine by {clip}. SSIM and PSNR: torchmetrics,"
        " against the dense model. Relative latent error: mean((z0' - z0)^2) / var(z0) against the"
        " dense model's final latents; its median is over pictures. Scene accuracy: the exact"
        " checker of ShapeWorld captions." + _intervals(settings.resamples) + "\n"
    )


def _intervals(resamples: int) -> str:
    if not resamples:
        return ""
    return (
        f" ±: the standard error over {resamples} resampled sets of prompts, the same for all"
        " variants. ≈: not told apart (two standard errors of the difference) from the best of the"
        " same model and sparsity."
    )


def write_tables(
    table: pd.DataFrame,
    folder: Path,
    published: Path | None = None,
    notes: str = "",
    mark: str = "",
    sets: Sequence[str] = ("evaluation",),
) -> None:
    """Write `main.csv` (raw values), and `main.md`, `main.tex` and `main.html`, which sorts by any
    column (rounded, with units).

    Args:
        table: as `main_table` returns it.
        folder: where to write.
        published: csv file of published results, shown below our table in `main.md`.
        notes: a paragraph below our table in `main.md` and `main.html`.
        mark: the hash of all that the table was made of, which each file carries; "": none.
        sets: the prompt sets that it has columns of.

    Raises:
        UserError: the file of published results cannot be read.
    """
    shown = readable(table, _measured(table, columns_of(sets)))
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
    write_table(folder / "main.html", "Results", shown, notes)


def readable(table: pd.DataFrame, columns: Sequence[Quantity]) -> pd.DataFrame:
    """Model, method and the given quantities as text, with units in the headers."""
    shown = table[["model", "method"]].rename(columns=str.capitalize)
    for column in columns:
        texts = [column.show(value) for value in table[column.key]]
        if f"{column.key}_se" in table:
            marks = zip(texts, table[f"{column.key}_se"], table[f"{column.key}_tied"], strict=True)
            texts = [_with_error(column, *one) for one in marks]
        shown[column.title] = texts
    return shown


def _with_error(column: Quantity, text: str, error: float, tied: object) -> str:
    if pd.isna(error):
        return text
    return f"{text} ± {column.show(error)}{' ≈' if tied is True else ''}"


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
        "±": r"$\pm$",
        "≈": r"$\approx$",
    }
    for sign, command in signs.items():
        text = text.replace(sign, command)
    return text
