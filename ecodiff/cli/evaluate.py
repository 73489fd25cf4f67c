"""The verbs that judge pictures, speed and memory."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ecodiff.cli.common import (
    Batch,
    Call,
    ConfigFile,
    Device,
    Load,
    Model,
    Of,
    Out,
    Record,
    Source,
    Table,
    Text,
    job,
    variants,
)
from ecodiff.config.sections import EfficiencySettings, EvaluateSettings, MaskCostSettings
from ecodiff.runtime.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.command()
def quality(
    table: Table,
    out: Out,
    variant: Annotated[list[str], typer.Option(help="name=shard,shard,...; the dense one first.")],
    settings: Text = None,
    device: Device = "auto",
    config: ConfigFile = None,
    learned: Annotated[
        list[Path] | None,
        typer.Option(help="A table that models learned from; logs what is shared."),
    ] = None,
) -> None:
    """Compare pictures with real ones, with their prompts and with the dense model's."""
    from ecodiff.evaluate.quality import Judge
    from ecodiff.evaluate.samples import Samples
    from ecodiff.prompts import read_prompts, say_shared
    from ecodiff.runtime.artifacts import write_json
    from ecodiff.runtime.devices import choose_device

    chosen = Source(config).read(EvaluateSettings, settings, "evaluate")
    shards = {name: [*map(Path, paths.split(","))] for name, paths in variants(variant).items()}
    reads = [table, config, *chain(*shards.values())]
    with job("evaluate.quality", out, reads=reads, variants=variant, **chosen.model_dump()):
        samples = {name: Samples(paths) for name, paths in shards.items()}
        for pictures in samples.values():  # before the first is judged
            pictures.check_dense(samples["dense"])
        rows = read_prompts(table)
        for other in learned or ():
            say_shared(rows, read_prompts(other), other)
        judge = Judge(rows, samples["dense"], chosen, choose_device(device), str(table))
        write_json(out, {name: judge(pictures) for name, pictures in samples.items()})


@app.command()
def efficiency(
    table: Table,
    out: Out,
    variant: Annotated[list[str], typer.Option(help="name=model, the dense one first.")],
    call: Call = None,
    settings: Text = None,
    load: Load = None,
    config: ConfigFile = None,
    of: Of = None,
) -> None:
    """Measure parameters, work, speed and memory of several variants in one run."""
    from ecodiff.evaluate.efficiency import efficiency as measure
    from ecodiff.models.pipelines import check_dense
    from ecodiff.models.structures import denoiser_of
    from ecodiff.runtime.artifacts import write_json

    source = Source(config, of)
    chosen = source.read(EfficiencySettings, settings, "evaluate", "efficiency")
    arguments = source.call(call)
    rows = _first(table, chosen.batch_size, "evaluate.efficiency.batch_size")
    (name, model), *others = variants(variant).items()
    reads = [table, config, model, *(path for _, path in others)]
    with job("evaluate.efficiency", out, reads=reads, variants=variant, **chosen.model_dump()):
        pipe = source.load(model, load)
        denoisers = {name: denoiser_of(pipe)}
        for other, path in others:
            pruned = source.load(path, load, device="cpu")
            check_dense(pruned, pipe)
            denoisers[other] = denoiser_of(pruned)
        found = measure(pipe, denoisers, [*rows["prompt"]], [*rows["seed"]], arguments, chosen)
        write_json(out, found)


@app.command()
def mask_cost(
    model: Model,
    table: Table,
    out: Out,
    call: Call = None,
    settings: Text = None,
    load: Load = None,
    config: ConfigFile = None,
    of: Of = None,
) -> None:
    """Measure time and memory of a learning iteration against the number of steps."""
    from ecodiff.evaluate.mask_cost import mask_cost as measure
    from ecodiff.models.pipelines import encode, starting_noise
    from ecodiff.runtime.artifacts import atomic

    source = Source(config, of)
    chosen = source.read(MaskCostSettings, settings, "evaluate", "mask_cost")
    arguments, rows = source.call(call), _first(table, chosen.batch, "evaluate.mask_cost.batch")
    reads = [model, table, config]
    with job("evaluate.mask_cost", out, reads=reads, model=model, **chosen.model_dump()):
        pipe = source.load(model, load)
        embeds = encode(pipe, [*rows["prompt"]], arguments)
        noise = starting_noise(pipe, [*rows["seed"]], arguments)
        found = measure(pipe, embeds, noise, arguments, chosen)
        with atomic(out) as file:
            found.to_csv(file, index=False)


@app.command()
def mask_error(
    model: Model,
    record: Record,
    out: Out,
    mask: Annotated[list[Path], typer.Option(help="What `ecodiff mask` wrote; repeatable.")],
    sparsity: Annotated[list[float], typer.Option(help="Where its scores are cut; repeatable.")],
    batch_size: Batch = 8,
    load: Load = None,
    config: ConfigFile = None,
    of: Of = None,
) -> None:
    """Measure how far masks move the final latents, without cutting; named after their folders."""
    from ecodiff.calibrate import Calibration
    from ecodiff.evaluate.mask_error import mask_error as measure
    from ecodiff.mask import Mask
    from ecodiff.runtime.artifacts import atomic

    masks: dict[str, Mask] = {}
    for path in mask:
        name = path.absolute().parent.name
        if name in masks:
            raise UserError(f"--mask: {path} and {masks[name].file} are both called {name}")
        masks[name] = Mask.load(path)
    calibration = Calibration.load(record)
    reads = [model, record, config, *mask]
    with job("evaluate.mask_error", out, reads=reads, model=model, record=str(record)):
        pipe = Source(config, of).load(model, load, encoders=False)
        found = measure(pipe, calibration, masks, sparsity, batch_size)
        with atomic(out) as file:
            found.to_csv(file, index=False)


def _first(table: Path, count: int, key: str) -> pd.DataFrame:
    """The first prompts of a table; `UserError` when it has fewer than the key asks for."""
    from ecodiff.prompts import read_prompts

    rows = read_prompts(table)
    if len(rows) < count:
        raise UserError(f"{key}: {count}, but {table} has {len(rows)} prompts")
    return rows.iloc[:count]
