"""The verbs that judge pictures, speed and memory."""

from __future__ import annotations

from functools import partial
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
    Shard,
    ShardSize,
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
    from torch import nn

app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.command()
def real(
    table: Table,
    out: Out,
    width: Annotated[int, typer.Option(min=1, help="Of the pictures that are compared.")],
    height: Annotated[int, typer.Option(min=1, help="As width.")],
    shard: Shard = 0,
    shard_size: ShardSize = None,
    settings: Text = None,
    device: Device = "auto",
    config: ConfigFile = None,
    learned: Annotated[
        list[Path] | None,
        typer.Option(help="A table that models learned from; logs what is shared."),
    ] = None,
) -> None:
    """Look at the real pictures of prompts, which FID, KID and CMMD compare with."""
    from ecodiff.evaluate.shards import see_real, write_seen
    from ecodiff.prompts import read_prompts, say_shared, shard_of
    from ecodiff.runtime.devices import choose_device

    chosen = Source(config).read(EvaluateSettings, settings, "evaluate")
    with job("evaluate.shards", out, reads=[table, config], **chosen.model_dump()):
        rows = read_prompts(table)
        for other in learned or ():
            say_shared(rows, read_prompts(other), other)
        rows = shard_of(rows, shard, shard_size or len(rows))
        seen = see_real(rows, (width, height), chosen, choose_device(device))
        write_seen(out, seen, chosen, (width, height))


@app.command()
def see(
    table: Table,
    pictures: Annotated[Path, typer.Argument(help="A shard of a variant's pictures.")],
    out: Out,
    dense: Annotated[Path, typer.Option(help="The dense model's shard of the same prompts.")],
    shard: Shard = 0,
    shard_size: ShardSize = None,
    settings: Text = None,
    device: Device = "auto",
    config: ConfigFile = None,
) -> None:
    """Look at a variant's pictures beside the dense model's, each by itself."""
    from ecodiff.evaluate.samples import Samples
    from ecodiff.evaluate.shards import see as look
    from ecodiff.evaluate.shards import write_seen
    from ecodiff.prompts import read_prompts, shard_of
    from ecodiff.runtime.devices import choose_device

    chosen = Source(config).read(EvaluateSettings, settings, "evaluate")
    reads = [table, config, pictures, dense]
    with job("evaluate.shards", out, reads=reads, **chosen.model_dump()):
        samples, theirs = Samples([pictures]), Samples([dense])
        rows = read_prompts(table)
        samples.check_prompts(shard_of(rows, shard, shard_size or len(rows)), str(table))
        seen = look(samples, theirs, chosen, choose_device(device))
        height, width, _ = samples.shape
        write_seen(out, seen, chosen, (width, height), samples.origin)


@app.command()
def quality(
    out: Out,
    seen: Annotated[list[Path], typer.Option(help="What `see` wrote of a shard; repeatable.")],
    real: Annotated[
        list[Path] | None, typer.Option(help="What `real` wrote of a shard; repeatable.")
    ] = None,
    settings: Text = None,
    device: Device = "auto",
    config: ConfigFile = None,
) -> None:
    """Judge a variant's pictures by all that was seen of them."""
    from ecodiff.evaluate.quality import quality as judge
    from ecodiff.evaluate.shards import Seen
    from ecodiff.runtime.artifacts import write_json
    from ecodiff.runtime.devices import choose_device

    chosen = Source(config).read(EvaluateSettings, settings, "evaluate")
    with job("evaluate.quality", out, reads=[config, *seen, *(real or ())]):
        references = Seen.read(real) if real else None
        found = judge(Seen.read(seen), references, chosen.resamples, choose_device(device))
        write_json(out, found)


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
        dense = denoiser_of(pipe)

        def denoiser(path: str) -> nn.Module:
            pruned = source.load(path, load, device="cpu", encoders=False)
            check_dense(pruned, pipe)
            return denoiser_of(pruned)

        denoisers = {name: lambda: dense} | {n: partial(denoiser, path) for n, path in others}
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
