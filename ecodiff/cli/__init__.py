"""The command line: one thin verb a stage.

Settings are YAML or JSON: a file, or the text itself. Torch is imported by the verbs that need it.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from ecodiff.cli import evaluate, report, stages, toys
from ecodiff.cli.common import is_first
from ecodiff.runtime.errors import Stopped, tell
from ecodiff.runtime.extras import extras_named

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
    stages.published,
    stages.prune,
    stages.trajectory,
    stages.retrain,
    stages.generate,
    report.explain,
):
    app.command()(verb)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(report.app, name="report")
app.add_typer(toys.app, name="toys")


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="ECODIFF_DEBUG", help="Show where errors come from.")
    ] = False,
) -> None:
    """Options of all verbs."""
    context.ensure_object(dict)["debug"] = debug


def main() -> None:
    """Runs the command; an error is one line, the last.

    Exit status 2 is for what the user can mend, 1 for faults of the machine's and of ours. A job
    that was told to stop ends with 75: the same command goes on where it was.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ecodiff").setLevel(logging.INFO if is_first() else logging.WARNING)
    if not sys.stderr.isatty():  # logs want lines, not the libraries' bars
        os.environ.setdefault("TQDM_DISABLE", "1")
    chosen = {"debug": False}
    try:
        with extras_named():
            app(obj=chosen)
    except Stopped:
        raise SystemExit(Stopped.exit_code) from None
    except Exception as error:
        verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "ecodiff")
        raise SystemExit(tell(error, verb, chosen["debug"])) from None
