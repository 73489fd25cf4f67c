"""The verbs of the stages that make models and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ecodiff.cli.common import (
    Batch,
    Call,
    ConfigFile,
    Load,
    Model,
    Of,
    Out,
    Record,
    Shard,
    ShardSize,
    Source,
    Table,
    Text,
    job,
    weight_bytes,
)
from ecodiff.config.sections import (
    CalibrateSettings,
    MaskSettings,
    PromptSet,
    PruneSettings,
    RetrainSettings,
)
from ecodiff.runtime.errors import UserError


def prompts(
    out: Out,
    settings: Text = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for pictures that come with the prompts.")
    ] = None,
    config: ConfigFile = None,
    name: Annotated[str, typer.Option("--set", help="The prompt set in that config.")] = "",
) -> None:
    """Make a table of prompts, seeds and real images from a source."""
    from ecodiff.prompts import make_prompts, write_prompts

    chosen = Source(config).read(PromptSet, settings, "prompts", name)
    place = pictures or out.with_suffix("")
    drawn = [place] if chosen.writes_pictures else []
    reads = [chosen.path, config]
    with job("prompts", out, folders=drawn, reads=reads, **chosen.model_dump()):
        write_prompts(make_prompts(chosen, place), out)


def calibrate(
    model: Model,
    table: Table,
    out: Out,
    call: Call = None,
    batch_size: Batch = 8,
    load: Load = None,
    config: ConfigFile = None,
    of: Of = None,
) -> None:
    """Record the dense model: embeddings, starting noise and final latents of each prompt."""
    from ecodiff.calibrate import calibrate as record
    from ecodiff.prompts import read_prompts

    source, rows = Source(config, of), read_prompts(table)
    arguments = source.call(call)
    reads = [model, table, config]
    with job("calibrate", out, reads=reads, model=model, prompts=str(table), call=arguments):
        pipe = source.load(model, load)
        record(pipe, [*rows["prompt"]], [*rows["seed"]], arguments, batch_size).save(out)


def grams(
    model: Model,
    record: Record,
    out: Out,
    settings: Text = None,
    load: Load = None,
    config: ConfigFile = None,
    of: Of = None,
) -> None:
    """Gather the activations' moments that compensation needs, in a folder."""
    from ecodiff.calibrate import Calibration
    from ecodiff.calibrate.grams import store_grams

    source, calibration = Source(config, of), Calibration.load(record)
    chosen = source.read(CalibrateSettings, settings, "calibrate")
    reads = [model, record, config]
    with job("calibrate", folders=[out], reads=reads, model=model, calibration=str(record)):
        pipe = source.load(model, load, encoders=False)
        store_grams(pipe, calibration, chosen.batch_size, out, chosen.memory_mb)


def mask(
    model: Model,
    out: Out,
    method: Annotated[str, typer.Option(help="ecodiff, or one of its peers; docs/methods.md.")],
    percent: Annotated[int, typer.Option(min=0, max=100, help="Parameters to remove.")],
    settings: Text = None,
    calibration: Annotated[Path | None, typer.Option(help="What methods look at.")] = None,
    history: Annotated[Path | None, typer.Option(help="Write the learning curve.")] = None,
    load: Load = None,
    config: ConfigFile = None,
    of: Of = None,
) -> None:
    """Score the units of a model and select those that stay."""
    from ecodiff.calibrate import Calibration
    from ecodiff.mask import make_mask
    from ecodiff.runtime.artifacts import atomic
    from ecodiff.runtime.state import unfinished
    from ecodiff.runtime.workers import Workers

    source = Source(config, of)
    chosen = source.of_model(MaskSettings, settings, "mask")
    record = Calibration.load(calibration) if calibration else None
    outputs = [out, history] if history else [out]
    with job("mask", *outputs, reads=[model, calibration, config]) as details:
        pipe = source.load(model, load, encoders=False)
        found, curve = make_mask(
            pipe,
            method,
            percent / 100,
            calibration=record,
            settings=chosen,
            # What an interrupted job continues from; not an output, which retries would remove.
            scratch=unfinished(out),
        )
        if not Workers(pipe.device).is_first:
            raise typer.Exit
        found.save(out)
        if history:
            with atomic(history) as file:
                curve.to_csv(file, index=False)
        details |= found.info


def published(
    model: Model,
    out: Out,
    files: Annotated[
        list[Path], typer.Argument(help="*attn.pt, *ff.pt and *norm.pt, as there are.")
    ],
    percent: Annotated[int, typer.Option(min=0, max=100, help="Parameters to remove.")],
    load: Load = None,
    config: ConfigFile = None,
    of: Of = None,
) -> None:
    """Make a mask of the logits that EcoDiff's authors publish."""
    from ecodiff.mask.published import published_mask

    with job("mask", out, reads=[model, *files, config]) as details:
        pipe = Source(config, of).load(model, load, encoders=False)
        found = published_mask(pipe, files, percent / 100)
        found.save(out)
        details |= found.info


def prune(
    model: Model,
    mask: Annotated[Path, typer.Argument(help="What `ecodiff mask` wrote.")],
    out: Out,
    percent: Annotated[int | None, typer.Option(help="Rank the mask's scores again.")] = None,
    grams: Annotated[Path | None, typer.Option(help="Compensate, all layers at once.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Compensate, in groups of layers.")
    ] = None,
    settings: Text = None,
    load: Load = None,
    config: ConfigFile = None,
    of: Of = None,
) -> None:
    """Cut a mask's units out of a model and save the smaller model."""
    from ecodiff.calibrate import Calibration
    from ecodiff.calibrate.grams import Grams
    from ecodiff.mask import Mask
    from ecodiff.models.saving import save
    from ecodiff.prune.cut import prune as cut

    if grams and calibration:
        raise UserError(
            "prune: --grams compensates all layers at once, --calibration in groups; not both"
        )
    source = Source(config, of)
    chosen = source.read(PruneSettings, settings, "prune")
    wanted, data = Mask.load(mask), Grams.load(grams) if grams else None
    data = Calibration.load(calibration) if calibration else data
    with job(
        "prune",
        folders=[out],
        reads=[model, mask, grams, calibration, config],
        bytes_needed=weight_bytes(model),
        model=model,
        compensation=data is not None,
    ) as details:
        pipe = source.load(model, load)
        if percent is not None:
            wanted = wanted.at(pipe, percent / 100)
        cut(pipe, wanted, data, chosen)
        save(pipe, out, wanted)
        details |= {"mask": wanted.info, **chosen.model_dump()}


def trajectory(
    model: Model,
    table: Table,
    out: Out,
    call: Call = None,
    batch_size: Batch = 16,
    shard: Shard = 0,
    shard_size: ShardSize = None,
    leader: Annotated[
        Path | None, typer.Option(help="A pruned model, at whose latents the dense one is asked.")
    ] = None,
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Ask it at the table's real pictures, noised.")
    ] = False,
    load: Load = None,
    config: ConfigFile = None,
    of: Of = None,
) -> None:
    """Record what the dense model reads and predicts at each step, for retraining."""
    from ecodiff.prompts import read_prompts, shard_of
    from ecodiff.retrain.trajectory import record

    source, rows = Source(config, of), read_prompts(table)
    arguments = source.call(call)
    rows = shard_of(rows, shard, shard_size or len(rows))
    if leader and pictures:
        raise UserError("trajectory: --leader and --pictures name different latents; not both")
    if pictures and rows["image"].isna().any():
        raise UserError(f"{table}: has prompts without a picture, which --pictures needs")
    with job(
        "retrain.trajectory",
        folders=[out],
        reads=[model, table, leader, config],
        model=model,
        leader=leader and str(leader),
        pictures=pictures,
        prompts=str(table),
        call=arguments,
    ):
        pipe = source.load(model, load)
        led = source.load(str(leader), load, encoders=False) if leader else None
        prompts, seeds = [*rows["prompt"]], [*rows["seed"]]
        images = [*rows["image"]] if pictures else None
        record(pipe, prompts, seeds, arguments, batch_size, out, led, images)


def retrain(
    model: Annotated[str, typer.Argument(help="Folder of a pruned model.")],
    out: Out,
    data: Annotated[list[Path], typer.Option(help="What `ecodiff trajectory` wrote; repeatable.")],
    recipe: Annotated[str, typer.Option(help="Which entry of the section retrain.")] = "lora",
    settings: Text = None,
    load: Load = None,
    config: ConfigFile = None,
    of: Of = None,
) -> None:
    """Teach a pruned model to predict what the dense one predicted."""
    from ecodiff.models.saving import save, save_adapter
    from ecodiff.retrain.train import retrain as train
    from ecodiff.runtime.artifacts import atomic
    from ecodiff.runtime.state import unfinished
    from ecodiff.runtime.workers import Workers

    source = Source(config, of)
    chosen = source.of_model(RetrainSettings, settings, "retrain", recipe)
    with job(
        "retrain",
        folders=[out],
        reads=[model, *data, config],
        bytes_needed=weight_bytes(model),
        model=model,
        data=[*map(str, data)],
        **chosen.model_dump(),
    ):
        pipe = source.load(model, load)
        trained = train(pipe, data, chosen, unfinished(out))
        if not Workers(pipe.device).is_first:
            raise typer.Exit
        with atomic(out, folder=True) as folder:
            save(pipe, folder)
            trained.history.to_csv(folder / "history.csv", index=False)
            if trained.adapter:
                save_adapter(pipe, trained.adapter, folder / "adapter")


def generate(
    model: Model,
    table: Table,
    out: Out,
    call: Call = None,
    batch_size: Batch = 8,
    shard: Shard = 0,
    shard_size: ShardSize = None,
    load: Load = None,
    config: ConfigFile = None,
    of: Of = None,
) -> None:
    """Draw a picture for each prompt of a table."""
    from ecodiff.generate import generate as draw
    from ecodiff.prompts import read_prompts, shard_of

    source, rows = Source(config, of), read_prompts(table)
    arguments = source.call(call)
    rows = shard_of(rows, shard, shard_size or len(rows))
    with job(
        "generate",
        folders=[out],
        reads=[model, table, config],
        bytes_needed=2 * arguments["height"] * arguments["width"] * len(rows),  # of a png
        model=model,
        prompts=str(table),
        call=arguments,
    ):
        draw(source.load(model, load), rows, arguments, batch_size, out)
