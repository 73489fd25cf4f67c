"""Prompt sets: tables of index, prompt, seed and real image, from whatever source.

Imports no torch.
"""

from __future__ import annotations

import logging
import os
import reprlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ecodiff.config.sections import PromptSet
from ecodiff.prompts.hub import read_dataset
from ecodiff.prompts.sources import READERS, draw_shapeworld
from ecodiff.runtime.artifacts import atomic
from ecodiff.runtime.errors import UserError, listed
from ecodiff.runtime.reading import read_columns

log = logging.getLogger(__name__)


def make_prompts(settings: PromptSet, images: str | Path) -> pd.DataFrame:
    """The table of a prompt set; one line of the log counts what was left out or is there twice.

    Args:
        images: folder for the pictures of shapeworld, which are drawn, and of datasets; other
            sources write none.

    Returns:
        index int, prompt str, seed int (the set's seed + index, so that no two prompts share
        their noise) and image (path of the real picture, or None).

    Raises:
        UserError: the source is missing, not of the expected layout, or too short; or pictures
            are missing.
    """
    counts = Counter[str]()
    if settings.source == "shapeworld":
        pairs = draw_shapeworld(settings, Path(images))
    elif settings.source == "datasets":
        pairs = read_dataset(settings, Path(images), counts)
    else:
        pairs = READERS[settings.source](settings, counts)
    name, found, pairs = settings.path or settings.source, len(pairs), pairs[: settings.count]
    captions = [caption for caption, _ in pairs]
    counts["repeated captions"] = len(captions) - len(set(captions))
    counts["captions of several lines"] = sum("\n" in caption for caption in captions)
    said = ", ".join(f"{what}: {count}" for what, count in counts.items() if count)
    if found < settings.count:
        short = f"prompts.count: {settings.count} wanted, but {name} has {found}"
        raise UserError(f"{short} ({said})" if said else short)
    if said:
        log.info("prompts: %s: %s", name, said)
    _find_pictures(settings, [image for _, image in pairs if image is not None])
    table = pd.DataFrame(pairs, columns=["prompt", "image"], dtype=object)
    table.insert(0, "index", np.arange(len(table)))
    table.insert(2, "seed", settings.seed + table["index"])
    return table


def shard_of(prompts: pd.DataFrame, shard: int, shard_size: int) -> pd.DataFrame:
    """The rows of one shard: `shard_size` rows of the table, the last shard maybe fewer.

    Raises:
        UserError: the table has no such shard.
    """
    shards = -(-len(prompts) // shard_size)
    if not 0 <= shard < shards:
        raise UserError(f"shard: {shard} is not one of 0 to {shards - 1} ({len(prompts)} prompts)")
    return prompts.iloc[shard * shard_size : (shard + 1) * shard_size]


def say_shared(table: pd.DataFrame, learned: pd.DataFrame, name: str | Path) -> None:
    """Log how many captions of a table are also in one that models learn from."""
    shared = int(table["prompt"].isin(learned["prompt"]).sum())
    if shared:
        log.warning("prompts: %s of %s captions are in %s too", shared, len(table), name)


def _find_pictures(settings: PromptSet, paths: list[str]) -> None:
    """UserError when real pictures are missing: better now than when all is drawn."""
    if settings.images is not None and not os.path.isdir(settings.images):
        raise UserError(f"prompts.images: there is no folder {settings.images}")
    missing = [os.path.basename(path) for path in paths if not os.path.isfile(path)]
    if missing:
        raise UserError(
            f"prompts.images: {len(missing)} of {len(paths)} pictures are missing in"
            f" {settings.images or settings.path}: {listed(missing, 5)}"
        )


def write_prompts(table: pd.DataFrame, path: str | Path) -> None:
    """Writes a table of `make_prompts` as parquet."""
    with atomic(path) as scratch:
        table.to_parquet(scratch, index=False)


def _is_number(value: Any) -> bool:
    # What int64 holds; torch's generators take all of it.
    return type(value) is int and 0 <= value < 2**63


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


# What the columns of a prompt table hold, in words and as a test.
COLUMNS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "index": ("a whole number from 0 to 2^63 - 1", _is_number),
    "prompt": ("a text", _is_text),
    "seed": ("a whole number from 0 to 2^63 - 1", _is_number),
    "image": ("a picture's path or nothing", lambda value: value is None or _is_text(value)),
}


def read_prompts(path: str | Path) -> pd.DataFrame:
    """Reads a table of `write_prompts`: the columns of `make_prompts`, in the order of `index`.

    Raises:
        UserError: the file is missing or no parquet, a column is missing, or a row is wrong.
    """
    table = dict(zip(COLUMNS, read_columns(path, list(COLUMNS)), strict=True))
    for name, values in table.items():
        wanted, is_right = COLUMNS[name]
        for row, value in enumerate(values, start=1):
            if not is_right(value):
                raise UserError(f"{path}, row {row}: {name} is {reprlib.repr(value)}, not {wanted}")
    if not table["index"]:
        raise UserError(f"{path}: has no prompts")
    index, times = Counter(table["index"]).most_common(1)[0]
    if times > 1:
        row = len(table["index"]) - table["index"][::-1].index(index)
        raise UserError(f"{path}, row {row}: index {index} is there {times} times")
    numbers = {"index": np.int64, "seed": np.int64}
    return pd.DataFrame(table, dtype=object).astype(numbers).sort_values("index", ignore_index=True)
