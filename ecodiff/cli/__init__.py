"""The command line: one thin verb a stage.

Settings are YAML or JSON: a file, or the text itself. Torch is imported by the verbs that need it.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ecodiff.config import sections
from ecodiff.config.reading import read_settings
from ecodiff.config.run import Config, load_config
from ecodiff.prompts import make_prompts, read_prompts, write_prompts
from ecodiff.runtime.artifacts import atomic, write_json, write_manifest
from ecodiff.runtime.errors import Stopped, UserError
from ecodiff.runtime.extras import extras_named

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ecodiff.report.results import Results

app = typer.Typer(
    help=f"{__doc__}\n\nprompts -> calibrate -> mask -> prune -> retrain -> generate -> evaluate"
    " -> report",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
evaluate = typer.Typer(help="Judge pictures, speed and memory.", no_args_is_help=True)
report = typer.Typer(help="Tables and figures of a run.", no_args_is_help=True)
toys = typer.Typer(help="The toy pipelines that the demo runs on.", no_args_is_help=True)
app.add_typer(evaluate, name="evaluate")
app.add_typer(report, name="report")
app.add_typer(toys, name="toys")

Model = Annotated[str, typer.Argument(help="Hub id or folder of a diffusers pipeline.")]
Table = Annotated[Path, typer.Argument(help="Prompt table, as `ecodiff prompts` writes it.")]
Record = Annotated[Path, typer.Argument(help="What `ecodiff calibrate` wrote.")]
Out = Annotated[Path, typer.Argument(help="Where to write.")]
Settings = Annotated[str | None, typer.Option(help="YAML file or text; defaults without.")]
Call = Annotated[str, typer.Option(help="How to call the pipeline: YAML file or text.")]
Batch = Annotated[int, typer.Option(min=1, help="Prompts that run together.")]
Run = Annotated[Path, typer.Argument(help="results/<run>, with its config.yaml.")]
Load = Annotated[str | None, typer.Option(help="dtype, device, revision, variant: YAML.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<n>.")]


def main() -> None:
    """Runs the command; an error of the user's is one line and exit status 2.

    A job that was told to stop ends with 75: the same command goes on where it was.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ecodiff").setLevel(logging.INFO)
    if not sys.stderr.isatty():  # logs want lines, not the libraries' bars
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        with extras_named():
            app()
    except UserError as error:
        print(f"ecodiff: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Stopped:
        raise SystemExit(Stopped.exit_code) from None


@app.command()
def prompts(
    out: Out,
    settings: Annotated[str, typer.Option(help="A prompt set: YAML file or text.")],
    pictures: Annotated[Path, typer.Option(help="Folder for pictures that are drawn.")],
) -> None:
    """Make a table of prompts, seeds and real images from a source."""
    chosen = read_settings(sections.PromptSet, settings)
    write_prompts(make_prompts(chosen, pictures), out)
    write_manifest(out, "prompts", chosen.model_dump())


@app.command()
def calibrate(
    model: Model,
    table: Table,
    out: Out,
    call: Call,
    batch_size: Batch = 8,
    load: Load = None,
) -> None:
    """Record the dense model: embeddings, starting noise and final latents of each prompt."""
    from ecodiff import calibrate as stage

    rows, arguments = read_prompts(table), _call(call)
    pipe = _load(model, load)
    record = stage.calibrate(pipe, [*rows["prompt"]], [*rows["seed"]], arguments, batch_size)
    record.save(out)
    write_manifest(out, "calibrate", {"model": model, "prompts": str(table), "call": arguments})


@app.command()
def grams(
    model: Model,
    record: Record,
    out: Out,
    batch_size: Batch = 8,
    load: Load = None,
) -> None:
    """Gather the activations' moments that compensation needs."""
    from ecodiff.calibrate import Calibration, gather_grams
    from ecodiff.models.structures import discover

    calibration = Calibration.load(record)
    pipe = _load(model, load, encoders=False)
    gather_grams(pipe, discover(pipe), calibration, batch_size).save(out)
    write_manifest(out, "calibrate", {"model": model, "calibration": str(record)})


@app.command()
def mask(
    model: Model,
    out: Out,
    method: Annotated[str, typer.Option(help="ecodiff, or one of its peers; docs/methods.md.")],
    percent: Annotated[int, typer.Option(min=0, max=100, help="Parameters to remove.")],
    settings: Settings = None,
    calibration: Annotated[Path | None, typer.Option(help="What methods look at.")] = None,
    history: Annotated[Path | None, typer.Option(help="Write the learning curve.")] = None,
    load: Load = None,
) -> None:
    """Score the units of a model and select those that stay."""
    from ecodiff import mask as stage
    from ecodiff.calibrate import Calibration
    from ecodiff.runtime.workers import Workers

    chosen = read_settings(sections.MaskSettings, settings)
    record = Calibration.load(calibration) if calibration else None
    pipe = _load(model, load, encoders=False)
    # What an interrupted job continues from; not an output, which retries would remove.
    scratch = out.with_name("unfinished.safetensors")
    found, curve = stage.make_mask(
        pipe,
        method,
        percent / 100,
        calibration=record,
        settings=chosen,
        scratch=scratch,
    )
    if not Workers(pipe.device).is_first:
        return
    found.save(out)
    if history:
        with atomic(history) as file:
            curve.to_csv(file, index=False)
    write_manifest(out, "mask", found.info)


@app.command()
def prune(
    model: Model,
    mask: Annotated[Path, typer.Argument(help="What `ecodiff mask` wrote.")],
    out: Out,
    percent: Annotated[int | None, typer.Option(help="Rank the mask's scores again.")] = None,
    grams: Annotated[Path | None, typer.Option(help="Compensate, all layers at once.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Compensate, in groups of layers.")
    ] = None,
    settings: Settings = None,
    load: Load = None,
) -> None:
    """Cut a mask's units out of a model and save the smaller model."""
    from ecodiff.calibrate import Calibration, Grams
    from ecodiff.mask import Mask
    from ecodiff.models import saving
    from ecodiff.prune.cut import prune as cut

    if grams and calibration:
        raise UserError(
            "prune: --grams compensates all layers at once, --calibration in groups; not both"
        )
    chosen = read_settings(sections.PruneSettings, settings)
    wanted, data = Mask.load(mask), Grams.load(grams) if grams else None
    data = Calibration.load(calibration) if calibration else data
    pipe = _load(model, load)
    if percent is not None:
        wanted = wanted.at(pipe, percent / 100)
    cut(pipe, wanted, data, chosen)
    saving.save(pipe, out)
    wanted.save(out / "mask.safetensors")
    details = {"model": model, "mask": wanted.info, "compensation": data is not None}
    write_manifest(out, "prune", {**details, **chosen.model_dump()})


@app.command()
def retrain(
    model: Annotated[str, typer.Argument(help="Folder of a pruned model.")],
    record: Record,
    out: Out,
    settings: Settings = None,
    dense: Annotated[str | None, typer.Option(help="The dense model, for distillation.")] = None,
    load: Load = None,
) -> None:
    """Retrain a pruned model on what the dense model generated."""
    from ecodiff.calibrate import Calibration
    from ecodiff.models import saving
    from ecodiff.models.structures import denoiser_of
    from ecodiff.retrain.train import retrain as train

    chosen = read_settings(sections.RetrainSettings, settings)
    data, pipe = Calibration.load(record), _load(model, load)
    teacher = (
        denoiser_of(_load(dense, load, encoders=False)) if dense and chosen.distillation else None
    )
    curve = train(pipe, data, chosen, teacher)
    saving.save(pipe, out)
    curve.to_csv(out / "history.csv", index=False)
    write_manifest(out, "retrain", {"model": model, "data": str(record), **chosen.model_dump()})


@app.command()
def generate(
    model: Model,
    table: Table,
    out: Out,
    call: Call,
    batch_size: Batch = 8,
    shard: Annotated[int, typer.Option(min=0, help="Which part of the table.")] = 0,
    shard_size: Annotated[int | None, typer.Option(min=1, help="Rows a part; all.")] = None,
    load: Load = None,
) -> None:
    """Draw a picture for each prompt of a table."""
    from ecodiff import generate as stage

    rows, arguments = read_prompts(table), _call(call)
    rows = stage.shard_of(rows, shard, shard_size or len(rows))
    pipe = _load(model, load)
    stage.generate(pipe, rows, arguments, batch_size, out)
    write_manifest(out, "generate", {"model": model, "prompts": str(table), "call": arguments})


@evaluate.command()
def quality(
    table: Table,
    out: Out,
    variant: Annotated[list[str], typer.Option(help="name=shard,shard,...; the dense one first.")],
    settings: Settings = None,
    device: Device = "auto",
) -> None:
    """Compare pictures with real ones, with their prompts and with the dense model's."""
    from ecodiff.evaluate.quality import Judge
    from ecodiff.evaluate.samples import Samples
    from ecodiff.runtime.devices import choose_device

    chosen = read_settings(sections.EvaluateSettings, settings)
    named = (one.partition("=")[::2] for one in variant)
    samples = {name: Samples([*map(Path, shards.split(","))]) for name, shards in named}
    dense = next(iter(samples.values()))
    judge = Judge(read_prompts(table), dense, chosen, choose_device(device))
    write_json(out, {name: judge(pictures) for name, pictures in samples.items()})
    write_manifest(out, "evaluate.quality", {"variants": variant, **chosen.model_dump()})


@evaluate.command()
def efficiency(
    table: Table,
    out: Out,
    variant: Annotated[list[str], typer.Option(help="name=model, the dense one first.")],
    call: Call,
    settings: Settings = None,
    load: Load = None,
) -> None:
    """Measure parameters, work, speed and memory of several variants in one run."""
    from ecodiff.evaluate.efficiency import efficiency as measure
    from ecodiff.models.structures import denoiser_of

    chosen, arguments = read_settings(sections.EfficiencySettings, settings), _call(call)
    rows = read_prompts(table).iloc[: chosen.batch_size]
    (name, model), *others = (one.partition("=")[::2] for one in variant)
    pipe = _load(model, load)
    denoisers = {name: denoiser_of(pipe)}
    denoisers |= {other: denoiser_of(_load(path, load, device="cpu")) for other, path in others}
    found = measure(pipe, denoisers, [*rows["prompt"]], [*rows["seed"]], arguments, chosen)
    write_json(out, found)
    write_manifest(out, "evaluate.efficiency", {"variants": variant, **chosen.model_dump()})


@evaluate.command()
def mask_cost(
    model: Model,
    table: Table,
    out: Out,
    call: Call,
    settings: Settings = None,
    load: Load = None,
) -> None:
    """Measure time and memory of a learning iteration against the number of steps."""
    from ecodiff.evaluate.mask_cost import mask_cost as measure
    from ecodiff.models.pipelines import encode, starting_noise

    chosen, arguments = read_settings(sections.MaskCostSettings, settings), _call(call)
    rows = read_prompts(table).iloc[: chosen.batch]
    pipe = _load(model, load)
    embeds = encode(pipe, [*rows["prompt"]], arguments)
    noise = starting_noise(pipe, [*rows["seed"]], arguments)
    found = measure(pipe, embeds, noise, arguments, chosen)
    with atomic(out) as file:
        found.to_csv(file, index=False)
    write_manifest(out, "evaluate.mask_cost", {"model": model, **chosen.model_dump()})


@evaluate.command()
def mask_error(
    model: Model,
    record: Record,
    out: Out,
    mask: Annotated[list[Path], typer.Option(help="What `ecodiff mask` wrote; repeatable.")],
    sparsity: Annotated[list[float], typer.Option(help="Where its scores are cut; repeatable.")],
    batch_size: Batch = 8,
    load: Load = None,
) -> None:
    """Measure how far masks move the final latents, without cutting; named after their folders."""
    from ecodiff.calibrate import Calibration
    from ecodiff.evaluate.mask_error import mask_error as measure
    from ecodiff.mask import Mask

    masks = {path.parent.name: Mask.load(path) for path in mask}
    pipe = _load(model, load, encoders=False)
    found = measure(pipe, Calibration.load(record), masks, sparsity, batch_size)
    with atomic(out) as file:
        found.to_csv(file, index=False)
    write_manifest(out, "evaluate.mask_error", {"model": model, "record": str(record)})


@report.command()
def tables(run: Run) -> None:
    """Write the main table (csv, markdown, LaTeX) and the ranking to <run>/tables."""
    from ecodiff.report.ranking import write_ranking
    from ecodiff.report.tables import how_measured, main_table, write_tables

    config, results = _results(run)
    published, table = config.report.published, main_table(results)
    notes = how_measured(config.evaluate)
    write_tables(table, run / "tables", Path(published) if published else None, notes)
    write_ranking(table, run / "tables", notes)


@report.command()
def figures(
    run: Run,
    only: Annotated[list[str] | None, typer.Option(help="Figures by name; repeatable.")] = None,
) -> None:
    """Draw figures of each model as png and pdf to <run>/figures."""
    from ecodiff.report.figures import FIGURES, draw

    _, results = _results(run)
    for name in only or FIGURES:
        for model in results.variants:
            draw(name, results, model, run / "figures")


@report.command()
def ablations(run: Run) -> None:
    """Write table and figure of what each setting of mask learning does."""
    from ecodiff.report.ablations import ablation_table, write_ablations

    write_ablations(ablation_table(load_config(run / "config.yaml"), run), run)


@report.command()
def show(run: Run) -> None:
    """Print the main table."""
    from ecodiff.report.tables import main_table, print_table

    print_table(main_table(_results(run)[1]))


@toys.command()
def train(
    name: Annotated[str, typer.Argument(help="toy-vae, toy-sdxl, toy-flux or toy-clip.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    vae: Annotated[Path | None, typer.Option(help="Pipelines: the trained toy-vae.")] = None,
) -> None:
    """Train one toy from nothing."""
    from ecodiff.toys.making import make

    make(name, out, vae)


@toys.command()
def gallery(
    source: Annotated[Path, typer.Argument(help="Folder of toy-sdxl or toy-flux.")],
    out: Annotated[Path, typer.Argument(help="The png to write.")],
) -> None:
    """Draw 32 captions that a toy never saw, with the checker's verdicts."""
    from ecodiff.toys.gallery import gallery as draw

    draw(source, out)


def _results(run: Path) -> tuple[Config, Results]:
    from ecodiff.report.results import Results

    config = load_config(run / "config.yaml")
    variants = {model: [v.name for v in config.variants_of(model)] for model in config.models}
    prompts = run / f"prompts/{config.evaluate.prompts}.parquet"
    shown = config.report.shown
    percents = None if shown is None else frozenset(round(100 * share) for share in shown)
    return config, Results(run, variants, prompts, config.report.examples, percents)


def _call(text: str) -> dict[str, Any]:
    return read_settings(sections.CallSettings, text).model_dump(exclude_none=True)


def _load(source: str, load: str | None, **changes: Any) -> DiffusionPipeline:
    from ecodiff.models.loading import load_pipeline
    from ecodiff.runtime.devices import choose_device

    chosen = read_settings(sections.LoadSettings, load).model_dump() | changes
    return load_pipeline(source, **{**chosen, "device": choose_device(chosen["device"])})
