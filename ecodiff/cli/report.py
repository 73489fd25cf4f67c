"""The verbs that write tables and figures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ecodiff.cli.common import Run
from ecodiff.config.plan import Plan
from ecodiff.config.run import Config, load_config
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.provenance import begin

if TYPE_CHECKING:
    from ecodiff.report.results import Results

app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.command()
def tables(run: Run) -> None:
    """Write the main table (csv, markdown, LaTeX) and the ranking to <run>/tables."""
    from ecodiff.report.ranking import write_ranking
    from ecodiff.report.tables import how_measured, main_table, write_tables

    config, results = _results(run)
    published, table = config.report.published, main_table(results)
    notes, settings = how_measured(config.evaluate), config.report.model_dump()
    begun = begin("report.tables", [*made_of(config, run), *filter(None, [published])])
    mark = begun.id(settings)
    theirs, sets = Path(published) if published else None, results.sets
    write_tables(table, run / "tables", theirs, notes, mark, sets)
    write_ranking(table, run / "tables", notes)
    begun.write_manifest(run / "tables", settings)


@app.command()
def figures(
    run: Run,
    only: Annotated[list[str] | None, typer.Option(help="Figures by name; repeatable.")] = None,
) -> None:
    """Draw those figures that each model can fill as png and pdf to <run>/figures."""
    from ecodiff.report.figures import draw

    config, results = _results(run)
    begun, plan = begin("report.figures", made_of(config, run)), Plan(config)
    all_of_run = [(name, model) for model in config.models for name in plan.figures(model)]
    known = [*dict.fromkeys(name for name, _ in all_of_run)]
    for name in only or []:
        if name not in known:
            raise UserError(f"--only: {name!r} is no figure of this run; it has {', '.join(known)}")
    for name, model in all_of_run:
        if not only or name in only:
            draw(name, results, model, run / "figures")
    begun.write_manifest(run / "figures", config.report.model_dump())


@app.command()
def gallery(run: Run) -> None:
    """Write <run>/index.html: the pictures of all variants side by side, prompt by prompt."""
    from ecodiff.report.gallery import write_gallery

    config, results = _results(run)
    seen = [
        path for model in config.models for path in run.glob(f"{model}/*/seen/{results.sets[0]}/*")
    ]
    begun = begin("report.gallery", [results.prompts, *sorted(seen)])
    write_gallery(results, run / "index.html")
    begun.write_manifest(run / "index.html", config.report.model_dump())


@app.command()
def ablations(run: Run) -> None:
    """Write table and figure of what each setting of mask learning does."""
    from ecodiff.report.ablations import ablation_table, write_ablations

    config = load_config(run / "config.yaml")
    begun = begin("report.ablations", sorted(run.glob("*/ablations/mask_error.csv")))
    write_ablations(ablation_table(config, run), run)
    for out in (run / "tables/ablations.csv", run / "figures/ablations.png"):
        begun.write_manifest(out, config.report.model_dump())


@app.command()
def show(run: Run) -> None:
    """Print the main table."""
    from ecodiff.report.tables import main_table, print_table

    print_table(main_table(_results(run)[1]))


def explain(
    file: Annotated[Path, typer.Argument(help="A result: a table, a picture, a mask, a model ...")],
) -> None:
    """Print where a result comes from, step by step, back to the prompts and models."""
    from ecodiff.runtime.provenance import explain

    print("\n".join(explain(file)))


def made_of(config: Config, run: Path) -> list[Path]:
    """What the report of a run reads of it, as far as it is there."""
    found = []
    for model in config.models:
        variants = config.variants_of(model)
        found += [run / model / file for file in ("efficiency.json", "mask_cost.csv")]
        found += [
            run / model / variant.name / "quality" / f"{name}.json"
            for variant in variants
            for name in config.evaluate.prompts
        ]
        found += [run / model / name / "model" for name in {v.pruned.name for v in variants}]
    return sorted(path for path in found if path.exists())


def _results(run: Path) -> tuple[Config, Results]:
    from ecodiff.report.results import Results

    config = load_config(run / "config.yaml")
    variants = {model: [v.name for v in config.variants_of(model)] for model in config.models}
    shown = config.report.shown
    percents = None if shown is None else frozenset(round(100 * share) for share in shown)
    sets, size = config.evaluate.prompts, config.generate.shard_size
    return config, Results(run, variants, sets, size, config.report.examples, percents)
