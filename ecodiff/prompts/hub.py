"""Prompts from what the library `datasets` reads: a data set of the hub, or a folder of its files.

Imports no torch.
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from ecodiff.config.sections import PromptSet
from ecodiff.runtime.artifacts import atomic
from ecodiff.runtime.errors import UserError, first_line, listed

Pairs = list[tuple[str, str | None]]


def read_dataset(settings: PromptSet, folder: Path, counts: Counter[str]) -> Pairs:
    """The first captions of a split, and their pictures where a column of them is named.

    A column of lists, of several captions a row, gives the first one that is not blank. No code of
    a data set is run. `HF_HUB_OFFLINE` is honoured: what was downloaded before is read then.

    Args:
        settings: of the prompt set.
        folder: where pictures are written, as they come.
        counts: of what is left out.

    Raises:
        UserError: the data set, its split or a column is not there, a caption is no text, or a
            picture cannot be read.
    """
    rows = _rows(settings)
    chosen = []
    for number, captions in enumerate(rows[settings.column]):
        caption = _first(captions, f"{settings.path}, row {number}")
        if caption:
            chosen.append((number, caption))
        else:
            counts["blank captions left out"] += 1
        if len(chosen) == settings.count:
            break
    if settings.image_column is None:
        return [(caption, None) for _, caption in chosen]
    with atomic(folder, folder=True) as scratch:
        names = [
            _write(rows[number][settings.image_column], scratch / f"{index:05d}", number, settings)
            for index, (number, _) in enumerate(chosen)
        ]
    return [(caption, str(folder / name)) for (_, caption), name in zip(chosen, names, strict=True)]


def _rows(settings: PromptSet) -> Any:
    """The split, with pictures as they were stored."""
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    place = Path(str(settings.path))
    try:
        if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(place))
            if isinstance(found, datasets.DatasetDict):
                found = found[settings.split]
        else:
            found = datasets.load_dataset(str(place), settings.subset, split=settings.split)
    except Exception as error:  # whatever a builder raises
        raise UserError(f"prompts.path: {place}: {first_line(error)}") from error
    for key in ("column", "image_column"):
        name = getattr(settings, key)
        if name is not None and name not in found.column_names:
            raise UserError(
                f"prompts.{key}: {place} has no column {name!r}; there are"
                f" {listed(found.column_names)}"
            )
    if settings.image_column is None:
        return found.select_columns([settings.column])
    if not isinstance(found.features[settings.image_column], datasets.Image):
        raise UserError(
            f"prompts.image_column: {settings.image_column} of {place} holds no pictures"
        )
    return found.cast_column(settings.image_column, datasets.Image(decode=False))


def _first(captions: Any, where: str) -> str:
    """The first caption that is not blank, or ""."""
    texts = captions if isinstance(captions, list) else [captions]
    wrong = [text for text in texts if not isinstance(text, str | None)]
    if wrong:
        raise UserError(f"{where}: {wrong[0]!r} is no text")
    return next((text.strip() for text in texts if text and text.strip()), "")


def _write(picture: Any, place: Path, number: int, settings: PromptSet) -> str:
    """Write a picture's own bytes; the name of the file, which ends as its format does."""
    try:
        data = picture["bytes"] or Path(picture["path"]).read_bytes()
        with Image.open(io.BytesIO(data)) as found:
            name = f"{place.name}.{str(found.format).lower()}"
    except (OSError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{settings.path}, row {number}: {settings.image_column} is no picture:"
            f" {first_line(error)}"
        ) from error
    place.with_name(name).write_bytes(data)
    return name
