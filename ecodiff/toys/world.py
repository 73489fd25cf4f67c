"""ShapeWorld: captioned 64x64 images of one or two shapes, drawn from signed distances.

A caption determines everything but the positions: "a small red ring left of a large
blue square on navy". Held-out captions are chosen by a hash of their text, so a caption
is in the same split whatever the seed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

SIDE = 64
RADII: dict[str, float] = {"small": 7.0, "large": 12.0}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "orange": (250, 140, 0),
    "yellow": (245, 235, 40),
    "green": (30, 180, 50),
    "cyan": (60, 225, 235),
    "blue": (50, 90, 255),
    "magenta": (225, 60, 220),
    "white": (250, 250, 250),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "navy": (0, 0, 95),
    "grey": (115, 115, 115),
    "maroon": (95, 0, 25),
}
RELATIONS = ("left of", "above")
GAP = 3.0  # pixels between two objects along the axis of their relation
MARGIN = 1.0  # pixels between an object and the frame

Split = Literal["train", "held-out"]


def _triangle(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return np.maximum(y - r, (2 * np.abs(x) - (y + r)) / np.sqrt(5))


def _cross(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    x, y, arm = np.abs(x), np.abs(y), 0.32 * r
    return np.minimum(np.maximum(x - r, y - arm), np.maximum(x - arm, y - r))


# Signed distances (pixels, negative inside) of shapes whose bounding box is [-r, r]^2.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": lambda x, y, r: np.hypot(x, y) - r,
    "square": lambda x, y, r: np.maximum(np.abs(x), np.abs(y)) - r,
    "triangle": _triangle,
    "diamond": lambda x, y, r: (np.abs(x) + np.abs(y) - r) / np.sqrt(2),
    "ring": lambda x, y, r: np.abs(np.hypot(x, y) - 0.78 * r) - 0.22 * r,
    "cross": _cross,
}


@dataclass(frozen=True)
class Thing:
    """One object: size, colour and shape as in captions, and its centre (x, y) in pixels."""

    size: str
    colour: str
    shape: str
    x: float = 0.0
    y: float = 0.0

    @property
    def words(self) -> str:
        """The words for it in a caption, such as "a small red ring"."""
        return f"a {self.size} {self.colour} {self.shape}"

    @property
    def radius(self) -> float:
        """Half the side of its bounding box, pixels."""
        return RADII[self.size]


@dataclass(frozen=True)
class Scene:
    """A background, one or two objects, and the relation of the first to the second."""

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def caption(self) -> str:
        """The caption, the prompt of a text-to-image model."""
        words = f" {self.relation} ".join(thing.words for thing in self.things)
        return f"{words} on {self.background}"


def vocabulary() -> list[str]:
    """Every word that a caption can hold, in a fixed order."""
    words = ["a", "on", *RADII, *COLOURS, *SHAPES, *BACKGROUNDS]
    return words + [word for relation in RELATIONS for word in relation.split()]


def parse_caption(caption: str) -> Scene:
    """The scene that a caption describes, without positions.

    Raises:
        ValueError: the caption is not a ShapeWorld caption.
    """
    try:
        words, background = caption.split(" on ")
        relation = next((r for r in RELATIONS if f" {r} " in words), None)
        parts = words.split(f" {relation} ") if relation else [words]
        things = tuple(Thing(*part.split(" ")[1:]) for part in parts)
        scene = Scene(background, things, relation)
        known = background in BACKGROUNDS and all(
            t.size in RADII and t.colour in COLOURS and t.shape in SHAPES for t in things
        )
    except (ValueError, TypeError):
        known = False
    if not known or scene.caption != caption:
        raise ValueError(f"not a ShapeWorld caption: {caption!r}")
    return scene


def is_held_out(caption: str) -> bool:
    """Whether a caption belongs to the tenth that training never sees."""
    return zlib.crc32(caption.encode()) % 10 == 0


def sample_scene(rng: np.random.Generator, split: Split = "train") -> Scene:
    """A random scene of a split; half of the scenes have a single object."""
    while True:
        count = 1 if rng.random() < 1 / 2 else 2
        things = tuple(
            Thing(*(str(rng.choice(list(names))) for names in (RADII, COLOURS, SHAPES)))
            for _ in range(count)
        )
        relation = str(rng.choice(RELATIONS)) if count == 2 else None
        scene = Scene(str(rng.choice(list(BACKGROUNDS))), things, relation)
        if is_held_out(scene.caption) == (split == "held-out"):
            return place(scene, rng)


def place(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene with random centres that fulfil its relation without overlap."""

    def anywhere(radius: float) -> float:
        return rng.uniform(radius + MARGIN, SIDE - radius - MARGIN)

    first, *rest = scene.things
    if not rest:
        things = (_at(first, anywhere(first.radius), anywhere(first.radius)),)
    else:
        (second,) = rest
        apart = first.radius + second.radius + GAP
        along = rng.uniform(first.radius + MARGIN, SIDE - second.radius - MARGIN - apart)
        beyond = rng.uniform(along + apart, SIDE - second.radius - MARGIN)
        across = anywhere(first.radius), anywhere(second.radius)
        if scene.relation == "left of":
            things = _at(first, along, across[0]), _at(second, beyond, across[1])
        else:
            things = _at(first, across[0], along), _at(second, across[1], beyond)
    return Scene(scene.background, things, scene.relation)


def _at(thing: Thing, x: float, y: float) -> Thing:
    return Thing(thing.size, thing.colour, thing.shape, x, y)


def coverage(shape: str, radius: float, x: float, y: float) -> np.ndarray:
    """Share of each pixel that a shape covers: float (SIDE, SIDE) in [0, 1]."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    return np.clip(0.5 - SHAPES[shape](columns - x, rows - y, radius), 0, 1)


def render(scene: Scene) -> np.ndarray:
    """The image of a scene: uint8 (SIDE, SIDE, 3)."""
    image = np.full((SIDE, SIDE, 3), BACKGROUNDS[scene.background], dtype=np.float64)
    for thing in scene.things:
        alpha = coverage(thing.shape, thing.radius, thing.x, thing.y)[..., None]
        image = (1 - alpha) * image + alpha * np.array(COLOURS[thing.colour])
    return np.round(image).astype(np.uint8)
