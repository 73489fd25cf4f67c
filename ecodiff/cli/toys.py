"""The verbs around the toy pipelines that the demo runs on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="toy-vae, toy-sdxl, toy-flux or toy-clip.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    vae: Annotated[Path | None, typer.Option(help="Pipelines: the trained toy-vae.")] = None,
) -> None:
    """Train one toy from nothing."""
    from ecodiff.toys.making import make

    make(name, out, vae)


@app.command()
def gallery(
    source: Annotated[Path, typer.Argument(help="Folder of toy-sdxl or toy-flux.")],
    out: Annotated[Path, typer.Argument(help="The png to write.")],
) -> None:
    """Draw 32 captions that a toy never saw, with the checker's verdicts."""
    from ecodiff.toys.gallery import gallery as draw

    draw(source, out)
