"""The command line: one thin verb a stage.

Settings are YAML or JSON: a file, or the text itself. Torch is imported by the verbs that need it.
"""

from __future__ import annotations

import logging
import os
import sys

import typer

from ecodiff.cli import evaluate, report, stages, toys
from ecodiff.runtime.errors import Stopped, UserError

app = typer.Typer(
    help=f"{__doc__}\n\nprompts -> calibrate -> mask -> prune -> retrain -> generate -> evaluate"
    " -> report",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (
    stages.prompts,
    stages.calibrate,
    stages.grams,
    stages.mask,
    stages.prune,
    stages.retrain,
    stages.generate,
):
    app.command()(verb)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(report.app, name="report")
app.add_typer(toys.app, name="toys")


def main() -> None:
    """Runs the command; an error of the user's is one line and exit status 2.

    A job that was told to stop ends with 75: the same command goes on where it was.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ecodiff").setLevel(logging.INFO)
    if not sys.stderr.isatty():  # logs want lines, not the libraries' bars
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        app()
    except UserError as error:
        print(f"ecodiff: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Stopped:
        raise SystemExit(Stopped.exit_code) from None
