"""Prompt sets: tables of index, prompt, seed and real image, from whatever source.

Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from ecodiff.config.sections import PromptSet
from ecodiff.runtime.artifacts import atomic
from ecodiff.runtime.errors import UserError
from ecodiff.toys import world

COLUMNS = ("index", "prompt", "seed", "image")


def make_prompts(settings: PromptSet, images: str | Path) -> pd.DataFrame:
    """The table of a prompt set.

    Args:
        images: folder that shapeworld renders its true pictures into.

    Returns:
        index int, prompt str, seed int (the set's seed + index, so that no two prompts share
        their noise) and image (path of the real picture, or None).

    Raises:
        UserError: the source is missing, not of the expected layout, or too short.
    """
    if settings.source == "shapeworld":
        pairs = _shapeworld(settings, Path(images))
    else:
        path = Path(settings.path or "")
        if not path.is_file():
            raise UserError(f"prompts.path: there is no file {path}")
        pairs = READERS[settings.source](settings, path)
    if len(pairs) < settings.count:
        raise UserError(
            f"prompts.count: {settings.count} wanted, but {settings.path} has {len(pairs)}"
        )
    pairs = pairs[: settings.count]
    table = pd.DataFrame(pairs, columns=["prompt", "image"], dtype=object)
    table.insert(0, "index", np.arange(len(table)))
    table.insert(2, "seed", settings.seed + table["index"])
    return table


def write_prompts(table: pd.DataFrame, path: str | Path) -> None:
    """Writes a table of `make_prompts` as parquet."""
    with atomic(path) as scratch:
        table.to_parquet(scratch, index=False)


def read_prompts(path: str | Path) -> pd.DataFrame:
    """Reads a table that `write_prompts` wrote; UserError when it is none."""
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a prompt table: {str(error).splitlines()[0]}") from None
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise UserError(f"{path}: not a prompt table: no column {missing[0]}")
    return table.sort_values("index", ignore_index=True)


Pairs = list[tuple[str, str | None]]


def _shapeworld(settings: PromptSet, folder: Path) -> Pairs:
    """Captions of one split with the pictures that they were drawn from."""
    rng = np.random.default_rng(settings.seed)
    scenes = [world.sample_scene(rng, settings.split) for _ in range(settings.count)]
    with atomic(folder, folder=True) as scratch:
        for index, scene in enumerate(scenes):
            Image.fromarray(world.render(scene)).save(scratch / f"{index:05d}.png")
    return [(scene.caption, str(folder / f"{i:05d}.png")) for i, scene in enumerate(scenes)]


def _file(settings: PromptSet, path: Path) -> Pairs:
    """The first prompts of a text file (a prompt a line), a csv or a parquet table."""
    if path.suffix == ".txt":
        lines = (line.strip() for line in path.read_text().splitlines())
        return [(line, None) for line in lines if line]
    if path.suffix not in {".csv", ".parquet"}:
        raise UserError(f"prompts.path: {path} is not a .txt, .csv or .parquet file")
    table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    if settings.column not in table:
        raise UserError(
            f"prompts.column: {path} has no column {settings.column!r}; "
            f"there are {', '.join(map(str, table.columns))}"
        )
    return [(str(prompt), None) for prompt in table[settings.column]]


def _coco(settings: PromptSet, path: Path) -> Pairs:
    """One caption each of random images of a COCO captions file (`captions_val2014.json`)."""
    try:
        content = json.loads(path.read_text())
        files = {image["id"]: image["file_name"] for image in content["images"]}
        captions = sorted(content["annotations"], key=lambda one: one["id"], reverse=True)
        first = {one["image_id"]: one["caption"].strip() for one in captions}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"prompts.path: {path} is not a COCO captions file ({error!r})") from None
    return _shuffled([(files[key], first[key]) for key in sorted(first)], settings)


def _flickr30k(settings: PromptSet, path: Path) -> Pairs:
    """One caption each of random images, from either csv layout that Flickr30k comes in.

    `image_name| comment_number| comment`, or `filename` and `raw` (a JSON list of captions).
    """
    separator = "|" if "|" in path.open().readline() else ","
    table = pd.read_csv(path, sep=separator, skipinitialspace=True)
    table.columns = [str(column).strip() for column in table.columns]
    if {"image_name", "comment"} <= set(table):
        table = table.dropna(subset=["comment"]).drop_duplicates("image_name")
        pairs = zip(table["image_name"], table["comment"], strict=True)
    elif {"filename", "raw"} <= set(table):
        pairs = ((name, json.loads(raw)[0]) for name, raw in table[["filename", "raw"]].values)
    else:
        raise UserError(
            f"prompts.path: {path} has neither the columns image_name and comment nor "
            f"filename and raw; there are {', '.join(table.columns)}"
        )
    return _shuffled(sorted((str(name), str(text).strip()) for name, text in pairs), settings)


def _gcc(settings: PromptSet, path: Path) -> Pairs:
    """The first rows of a GCC3M file: caption, tab, address."""
    rows = (line.split("\t")[0].strip() for line in path.read_text().splitlines())
    return [(caption, None) for caption in rows if caption]


def _shuffled(captioned: list[tuple[str, str]], settings: PromptSet) -> Pairs:
    """Captions with their images' paths, in an order drawn from the set's seed."""
    if settings.images is None:
        raise UserError(f"prompts.images: source {settings.source} needs the folder of its images")
    order = np.random.default_rng(settings.seed).permutation(len(captioned))
    folder = Path(settings.images)
    return [(captioned[i][1], str(folder / captioned[i][0])) for i in order]


READERS: dict[str, Callable[[PromptSet, Path], Pairs]] = {
    "file": _file,
    "coco": _coco,
    "flickr30k": _flickr30k,
    "gcc": _gcc,
}
