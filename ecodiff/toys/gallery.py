"""A gallery of a toy: held-out captions, its images, and which of them the checker rejects."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from ecodiff.models.loading import load_pipeline
from ecodiff.runtime.artifacts import atomic
from ecodiff.toys import checker
from ecodiff.toys.making import CALLS, draw, held_out

COLUMNS, ROWS = 8, 4


def gallery(source: Path, out: Path) -> None:
    """Draw the first 32 held-out captions with a toy and write them as one png.

    Args:
        source: the folder of the toy, named as in `making.CALLS`.
        out: the png file.
    """
    _, captions = held_out(COLUMNS * ROWS)
    pictures = draw(load_pipeline(source), captions, CALLS[source.name])
    figure, axes = plt.subplots(ROWS, COLUMNS, figsize=(12, 8), layout="constrained")
    for axis, picture, caption in zip(axes.flat, pictures, captions, strict=True):
        _panel(axis, picture, caption)
    met = checker.scene_accuracy(pictures, captions)
    figure.suptitle(
        f"{source.name}: 32 captions it never saw in training, {met:.0%} drawn as told"
        " (misses framed in red)"
    )
    with atomic(out) as file:
        figure.savefig(file, dpi=110)
    plt.close(figure)


def _panel(axis: plt.Axes, picture: np.ndarray, caption: str) -> None:
    axis.imshow(picture, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    words = caption.replace(" left of ", "\nleft of ").replace(" above ", "\nabove ")
    axis.set_title(words.replace(" on ", "\non "), fontsize=6)
    if not checker.meets(picture, caption):
        for spine in axis.spines.values():
            spine.set(color="red", linewidth=2.5)
