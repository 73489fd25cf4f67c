"""Recognises the objects of a ShapeWorld image by rules, and judges captions by them.

The background is the palette colour nearest to the median of the outermost pixels.
Pixels that differ from it form connected components; each is compared with every shape
drawn at its place. An image meets its caption only if every component is recognised and
together they are what the caption says.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy import ndimage

from ecodiff.toys import world
from ecodiff.toys.world import Scene, Thing

DIFFERENT = 48.0  # RGB distance from the background that makes a pixel part of something
MIN_PIXELS = 12  # smaller components are ignored as specks
MIN_OVERLAP = 0.75  # intersection over union that a recognised shape must reach
MAX_COLOUR_ERROR = 90.0  # RGB distance beyond which a colour counts as none of the world's


def read_scene(image: np.ndarray) -> tuple[str, list[Thing | None]]:
    """The background and the objects of an image.

    Args:
        image: uint8 (SIDE, SIDE, 3).

    Returns:
        The name of the background colour, and the objects; None for one that matches no shape and
        colour of the world.
    """
    pixels = image.astype(np.float64)
    frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background, _ = _nearest(np.median(frame, axis=0), world.BACKGROUNDS)
    base = np.array(world.BACKGROUNDS[background], dtype=np.float64)
    distance = np.linalg.norm(pixels - base, axis=-1)
    labels, count = ndimage.label(distance > DIFFERENT)
    sizes = ndimage.sum_labels(np.ones_like(labels), labels, range(1, count + 1))
    things = [
        _read_thing(pixels, base, distance, labels == label)
        for label, size in enumerate(sizes, start=1)
        if size >= MIN_PIXELS
    ]
    return background, things


def meets(image: np.ndarray, caption: str) -> bool:
    """Whether an image, uint8 (SIDE, SIDE, 3), shows exactly what its caption says.

    Raises `ValueError` when the caption is not a ShapeWorld caption.
    """
    wanted = world.parse_caption(caption)
    background, things = read_scene(image)
    if background != wanted.background or len(things) != len(wanted.things):
        return False
    if any(thing is None for thing in things):
        return False
    return any(_same(wanted, order) for order in (things, things[::-1]))


def scene_accuracy(images: Sequence[np.ndarray], captions: Sequence[str]) -> float:
    """The share of images, 0 to 1, that show exactly what their captions say."""
    met = [meets(image, caption) for image, caption in zip(images, captions, strict=True)]
    return float(np.mean(met))


def _same(wanted: Scene, things: Sequence[Thing]) -> bool:
    if any(w.words != t.words for w, t in zip(wanted.things, things, strict=True)):
        return False
    if wanted.relation == "left of":
        return things[0].x < things[1].x - 2
    if wanted.relation == "above":
        return things[0].y < things[1].y - 2
    return True


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    distances = {name: float(np.linalg.norm(colour - rgb)) for name, rgb in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name, distances[name]


def _read_thing(
    pixels: np.ndarray, base: np.ndarray, distance: np.ndarray, where: np.ndarray
) -> Thing | None:
    core = where & (distance >= 0.85 * np.quantile(distance[where], 0.9))
    colour, error = _nearest(np.median(pixels[core], axis=0), world.COLOURS)
    if error > MAX_COLOUR_ERROR:
        return None
    # How much of a pixel the object covers: its colour's position, 0 to 1, on the line from the
    # background's colour to the object's.
    line = np.array(world.COLOURS[colour]) - base
    near = ndimage.binary_dilation(where, iterations=1)
    cover = np.where(near, np.clip((pixels - base) @ line / (line @ line), 0, 1), 0)
    rows, columns = np.nonzero(cover > 0.5)
    if rows.size == 0:
        return None
    y, x = (rows.min() + rows.max() + 1) / 2, (columns.min() + columns.max() + 1) / 2
    size, shape, overlap = max(_overlaps(cover, x, y), key=lambda found: found[-1])
    return Thing(size, colour, shape, x, y) if overlap >= MIN_OVERLAP else None


def _overlaps(cover: np.ndarray, x: float, y: float) -> list[tuple[str, str, float]]:
    """Soft intersection over union with every (size, shape), the best over half-pixel shifts."""
    column, row = int(np.floor(x)), int(np.floor(y))
    padded = np.pad(cover, _REACH)
    window = padded[row : row + 2 * _REACH + 1, column : column + 2 * _REACH + 1]
    rest = cover.sum() - window.sum()
    found = []
    for (size, shape), templates in _templates().items():
        both = np.minimum(window, templates).sum((1, 2))
        either = np.maximum(window, templates).sum((1, 2)) + rest
        found.append((size, shape, float((both / either).max())))
    return found


_REACH = 16  # half side of the window in which an object is matched, pixels


@cache
def _templates() -> dict[tuple[str, str], np.ndarray]:
    """Pixel coverage of each (size, shape) at half-pixel shifts: (shifts, window, window)."""
    rows, columns = np.mgrid[-_REACH : _REACH + 1, -_REACH : _REACH + 1] + 0.5
    shifts = [(dx, dy) for dx in np.arange(-0.5, 2.0, 0.5) for dy in np.arange(-0.5, 2.0, 0.5)]
    return {
        (size, shape): np.stack(
            [np.clip(0.5 - sdf(columns - dx, rows - dy, radius), 0, 1) for dx, dy in shifts]
        )
        for size, radius in world.RADII.items()
        for shape, sdf in world.SHAPES.items()
    }
