"""Reads what stages left: masks, tables, numbers of pictures. `UserError` where a file is missing
or damaged. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open

from ecodiff.runtime.errors import UserError
from ecodiff.runtime.reading import read_text

# What `read_seen` reads of each picture.
SEEN = (
    *("index", "clip_score", "ssim", "latent_error", "dense_mean", "dense_square"),
    *("objects", "shown"),
)


def read_mask(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What a mask keeps, structure name -> bool (units,), and what it says of itself; `UserError`
    when it is missing or damaged."""
    try:
        with safe_open(path, framework="np") as file:
            kept = [key for key in file.keys() if key.startswith("kept/")]  # noqa: SIM118
            found = {key.removeprefix("kept/"): file.get_tensor(key) for key in kept}
            return found, json.loads(file.metadata()["ecodiff"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def read_seen(path: Path) -> pd.DataFrame:
    """The numbers of each picture of a shard; features stay on disk."""
    try:
        with safe_open(path, framework="np") as file:
            return pd.DataFrame({key: file.get_tensor(key) for key in SEEN})
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def read_csv(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """A table that a stage left; `UserError` when it is missing, damaged or lacks a column."""
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    missing = [column for column in columns if column not in table]
    if missing:
        raise UserError(f"{path}: has no column {missing[0]}; run the stage that made it again")
    return table


def read_json(path: Path) -> dict[str, Any]:
    """A mapping; NaN and infinity are no JSON."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        found = json.loads(read_text(path), parse_constant=refuse)
    except ValueError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: is not a mapping of variants")
    return found
