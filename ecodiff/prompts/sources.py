"""Where prompts come from: a reader a source. Imports no torch.

A reader takes the settings of a prompt set and a counter for what it leaves out, and returns all
prompts that there are, in order, each with the path of its real picture or None.
"""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, StrictInt, ValidationError

from ecodiff.config.sections import PromptSet
from ecodiff.prompts.rows import FORMATS, Table, parse_json
from ecodiff.runtime.artifacts import atomic
from ecodiff.runtime.errors import UserError, listed
from ecodiff.runtime.reading import read_lines, read_text
from ecodiff.toys import world

Pairs = list[tuple[str, str | None]]
BLANK = "blank rows left out"


def draw_shapeworld(settings: PromptSet, folder: Path) -> Pairs:
    """Captions of one split with the pictures that they were drawn from."""
    rng = np.random.default_rng(settings.seed)
    scenes = [world.sample_scene(rng, settings.split) for _ in range(settings.count)]
    with atomic(folder, folder=True) as scratch:
        for index, scene in enumerate(scenes):
            Image.fromarray(world.render(scene)).save(scratch / f"{index:05d}.png")
    return [(scene.caption, str(folder / f"{i:05d}.png")) for i, scene in enumerate(scenes)]


def _file(settings: PromptSet, counts: Counter[str]) -> Pairs:
    """The prompts of a text file (a prompt a line) or of a column of a table."""
    path = Path(str(settings.path))
    values = FORMATS.get(path.suffix.lower())
    if values is None:
        raise UserError(f"prompts.path: {path} is not a file of {', '.join(FORMATS)}")
    texts = (_text(value, f"{path}, {where}") for where, value in values(path, settings.column))
    return [(text, None) for text in _not_blank(texts, counts)]


class _CocoImage(BaseModel):
    id: StrictInt
    file_name: str


class _CocoAnnotation(BaseModel):
    id: StrictInt
    image_id: StrictInt
    caption: str


class _Coco(BaseModel):
    images: list[_CocoImage]
    annotations: list[_CocoAnnotation]


def _coco(settings: PromptSet, counts: Counter[str]) -> Pairs:
    """One caption each of random images of a COCO captions file (`captions_val2014.json`): the
    first by its id that is not blank."""
    path = settings.path
    try:
        found = _Coco.model_validate(parse_json(read_text(str(path)), f"{path}"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path}: not a COCO captions file: {where}{': ' if where else ''}{first['msg']}"
        ) from None
    names = {image.id: image.file_name for image in found.images}
    captions: dict[int, str] = {}
    for one in sorted(found.annotations, key=lambda one: one.id):
        if one.image_id not in names:
            counts["annotations of images that are not listed left out"] += 1
        elif not one.caption.strip():
            counts["blank captions left out"] += 1
        else:
            captions.setdefault(one.image_id, one.caption.strip())
    return _shuffled([(names[key], captions[key]) for key in sorted(captions)], settings)


# Captions are as written: bars and quotes are theirs. One row of the csv that circulates lacks its
# second bar.
BARS = re.compile(r"(?P<name>[^|]+)\|\s*\d+\s*\|?(?P<caption>.*)")
TOKEN = re.compile(r"(?P<name>[^\t]+)#\d+\t(?P<caption>.*)")


def _flickr30k(settings: PromptSet, counts: Counter[str]) -> Pairs:
    """The first caption each of random images, from any layout that Flickr30k comes in.

    `image_name| comment_number| comment`; the original `1.jpg#0`, tab, caption; or a csv with the
    columns `filename` and `raw` (a JSON list of captions), or `image_name` and `comment`.
    """
    path = Path(str(settings.path))
    first = next(iter(read_lines(path)), "")
    if re.fullmatch(r"\s*image_name\s*\|\s*comment_number\s*\|\s*comment\s*", first):
        named = _matches(path, BARS, skip=1)
    elif TOKEN.fullmatch(first):
        named = _matches(path, TOKEN)
    else:
        named = _flickr30k_csv(path)
    captions: dict[str, str] = {}
    for name, caption in named:
        if caption.strip():
            captions.setdefault(name.strip(), caption.strip())
        else:
            counts[BLANK] += 1
    return _shuffled(sorted(captions.items()), settings)


def _matches(path: Path, layout: re.Pattern[str], skip: int = 0) -> Iterator[tuple[str, str]]:
    """Image and caption of each line; a blank line has blank ones."""
    for number, line in enumerate(read_lines(path)[skip:], start=skip + 1):
        row = layout.fullmatch(line)
        if row:
            yield row["name"], row["caption"]
        elif line.strip():
            raise UserError(f"{path}, line {number}: no image, number and caption")
        else:
            yield "", ""


def _flickr30k_csv(path: Path) -> Iterator[tuple[str, str]]:
    """Image and caption of each row, or of each caption where a row has several."""
    table = Table(path)
    if {"image_name", "comment"} <= set(table.header):
        name, comment = table.column("image_name"), table.column("comment")
        yield from ((row[name], row[comment]) for _, row in table.rows())
    elif {"filename", "raw"} <= set(table.header):
        name, raw = table.column("filename"), table.column("raw")
        for where, row in table.rows():
            where = f"{path}, {where}"
            captions = parse_json(row[raw], where) if row[raw].strip() else [""]
            if not isinstance(captions, list):
                raise UserError(f"{where}: raw is not a list of captions")
            yield from ((row[name], _text(caption, where)) for caption in captions)
    else:
        raise UserError(
            f"{path}: has neither the columns image_name and comment nor filename and raw, nor"
            f" rows as 1.jpg#0, tab, caption; there are {listed(table.header)}"
        )


ADDRESS = re.compile(r"[a-z]+://\S*", re.IGNORECASE)


def _gcc(settings: PromptSet, counts: Counter[str]) -> Pairs:
    """The captions of a GCC3M file (caption, tab, address) or a CC12M file (address first), with
    or without a header."""
    path = settings.path
    lines = read_lines(str(path))
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    counts[BLANK] += len(lines) - len(rows)
    skipped, place, width = _gcc_layout(path, [line.split("\t") for _, line in rows[:2]])
    counts["header lines left out"] = skipped
    texts = []
    for number, line in rows[skipped:]:
        fields = line.split("\t")
        if len(fields) != width:
            raise UserError(f"{path}, line {number}: fields: {len(fields)}, above: {width}")
        texts.append(fields[place].strip())
        if ADDRESS.fullmatch(texts[-1]):
            raise UserError(f"{path}, line {number}: an address is where captions are")
    return [(text, None) for text in _not_blank(texts, counts)]


def _gcc_layout(path: str | None, head: list[list[str]]) -> tuple[int, int, int]:
    """Lines of header (0 or 1), the captions' column and the number of columns."""
    for skipped, fields in enumerate(head):
        addresses = [i for i, field in enumerate(fields) if ADDRESS.fullmatch(field.strip())]
        if len(fields) > 1 and addresses in ([0], [1]):
            return skipped, 1 - addresses[0], len(fields)
    found = listed(head[0]) if head else "nothing"
    raise UserError(f"{path}: no columns of captions and addresses with a tab between, but {found}")


def _not_blank(texts: Iterable[str], counts: Counter[str]) -> Iterator[str]:
    """The texts that say something; the others are counted."""
    for text in texts:
        if text:
            yield text
        else:
            counts[BLANK] += 1


def _text(value: Any, where: str) -> str:
    """A text without the blanks around it, "" for none; UserError when it is something else."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8") from None
    if value is None or isinstance(value, str):
        return (value or "").strip()
    raise UserError(f"{where}: {reprlib.repr(value)} is not text")


def _shuffled(captioned: list[tuple[str, str]], settings: PromptSet) -> Pairs:
    """Captions with their images' paths, in an order drawn from the set's seed."""
    order = np.random.default_rng(settings.seed).permutation(len(captioned))
    folder = Path(str(settings.images))
    return [(captioned[i][1], str(folder / captioned[i][0])) for i in order]


PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def _folder(settings: PromptSet, counts: Counter[str]) -> Pairs:
    """The pictures of a folder with their captions, by name: from `metadata.csv` (or tsv, jsonl,
    parquet; columns `file_name` and `column`), or each from the txt file beside its picture."""
    folder = Path(str(settings.path))
    lists = (folder / f"metadata{suffix}" for suffix in FORMATS if suffix != ".txt")
    metadata = next((path for path in lists if path.is_file()), None)
    if metadata:
        values = FORMATS[metadata.suffix]
        names, texts = (
            [_text(value, f"{metadata}, {where}") for where, value in values(metadata, column)]
            for column in ("file_name", settings.column)
        )
        captions = {str(folder / name): text for name, text in zip(names, texts, strict=True)}
    else:
        captions = _captions_beside(folder)
    counts["pictures with blank captions left out"] = sum(not text for text in captions.values())
    return [(text, path) for path, text in sorted(captions.items()) if text]


def _captions_beside(folder: Path) -> dict[str, str]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not found:
        raise UserError(f"prompts.path: {folder} is no folder of pictures ({', '.join(PICTURES)})")
    without = [path.name for path in found if not path.with_suffix(".txt").is_file()]
    if without:
        raise UserError(
            f"prompts.path: {len(without)} of {len(found)} pictures in {folder} have no caption:"
            f" {listed(without, 5)}; it is in a .txt file of the same name, or all are in a"
            " metadata.csv, tsv, jsonl or parquet with a column file_name"
        )
    return {str(path): read_text(path.with_suffix(".txt")).strip() for path in found}


READERS: dict[str, Callable[[PromptSet, Counter[str]], Pairs]] = {
    "file": _file,
    "folder": _folder,
    "coco": _coco,
    "flickr30k": _flickr30k,
    "gcc": _gcc,
}
