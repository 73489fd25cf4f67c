"""Figures drawn as pictures: the images of variants, and a map of the units that were removed."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from ecodiff.config.variants import Variant
from ecodiff.report.drawing import WIDTH, panels
from ecodiff.report.results import Results
from ecodiff.report.style import colour, label, method
from ecodiff.runtime.errors import UserError

KINDS = {
    "heads": "Attention heads",
    "neurons": "FFN neurons",
    "modulation": "Modulation channels",
    "directions": "Directions of what modulation reads",
}
GAP = 6  # white pixels between images
MAX_TICKS = 34  # number of structure names that fit below a panel
NAMES = 1.25  # inches for the names of variants beside their pictures
LINE, ROW = 0.12, 0.15  # inches of a line of captions, of a mask's row
ORDER = ("down", "transformer_blocks", "mid", "single", "up")  # of blocks in a forward pass


def pictures(results: Results, model: str) -> Figure:
    """The images of the first prompts: one row per variant, one column per prompt."""
    variants, chosen = results.shown(model), results.captions().iloc[: results.examples]
    cells = [[results.picture(model, v, index) for index in chosen.index] for v in variants]
    odd = [
        f"prompt {index}, {variant.name}: {picture.shape}"
        for variant, line in zip(variants, cells, strict=True)
        for index, picture in zip(chosen.index, line, strict=True)
        if picture.shape != cells[0][0].shape
    ]
    if odd:
        raise UserError(f"report: pictures of {model} differ in size: {odd[0]}")
    height, width = (side + GAP for side in cells[0][0].shape[:2])
    mosaic = np.full((height * len(variants), width * len(chosen), 3), 255, dtype=np.uint8)
    for row, pictures_of_variant in enumerate(cells):
        for column, picture in enumerate(pictures_of_variant):
            place = mosaic[row * height : (row + 1) * height, column * width : (column + 1) * width]
            place[:-GAP, :-GAP] = picture
    captions = textwrap.wrap(
        " · ".join(f"{number}: {caption}" for number, caption in enumerate(chosen, 1)), 84
    )
    side = (WIDTH - NAMES) / len(chosen)
    figure, axes = panels(1, 1, side * len(variants) * height / width + 0.75 + LINE * len(captions))
    axis = axes[0, 0]
    axis.imshow(mosaic, interpolation="none")
    axis.set_anchor("E")  # room that is left is for the names
    axis.spines[:].set_visible(False)
    axis.grid(visible=False)
    axis.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    rows, columns = (np.arange(len(of)) for of in (variants, chosen))
    axis.set_yticks((rows + 0.5) * height - GAP / 2, map(_name, variants))
    axis.set_xticks((columns + 0.5) * width - GAP / 2, columns + 1)
    for text, variant in zip(axis.get_yticklabels(), variants, strict=True):
        text.set(color=colour(variant), fontweight="bold")
    # A dollar sign in a caption begins no formula.
    axis.set_xlabel("\n".join(captions), fontsize=6.5, parse_math=False)
    figure.suptitle(f"{model}: the same prompts and starting noise")
    return figure


def _name(variant: Variant) -> str:
    share = "" if variant.is_dense else f", {variant.percent} %"
    name, *more = method(variant).split(" + ")
    return "\n".join([*textwrap.wrap(name + share, 16), *(f"+ {one}" for one in more)])


def removed(results: Results, model: str) -> Figure:
    """The share of units removed from each structure: one panel per kind, one row per mask that has
    structures of that kind."""
    found = {mask: results.removed(model, mask) for mask in results.masks(model)}
    of_kinds = {kind: _of_kind(found, kind) for kind in KINDS}
    drawn = {kind: shares for kind, shares in of_kinds.items() if shares}
    rows = [*map(len, drawn.values())]
    height = 0.3 + 1.1 * len(drawn) + ROW * sum(rows)
    figure, axes = panels(len(drawn), 1, height, height_ratios=rows)
    for axis, (kind, shares) in zip(axes[:, 0], drawn.items(), strict=True):
        names = sorted(next(iter(shares.values())), key=_depth)
        cells = np.array([[100 * of[name] for name in names] for of in shares.values()])
        image = axis.imshow(cells, aspect="auto", cmap="cividis_r", vmin=0, vmax=100)
        every = -(-len(names) // MAX_TICKS)
        axis.set_xticks(range(0, len(names), every), [_short(name) for name in names[::every]])
        axis.tick_params(axis="x", rotation=90, labelsize=6)
        axis.set_yticks(range(len(shares)), [label(mask) for mask in shares])
        axis.set(title=KINDS[kind], xlabel="Layer, in the order of the forward pass")
        axis.grid(visible=False)
    bar = figure.colorbar(image, ax=axes[:, 0], shrink=0.8)
    bar.set_label("Units removed (% of the layer)")
    figure.suptitle(f"{model}: what was removed from each layer")
    return figure


def _of_kind(
    found: Mapping[Variant, Mapping[str, float]], kind: str
) -> dict[Variant, dict[str, float]]:
    """The structures of a kind of those masks that have any: some take modulation by channels,
    others by directions."""
    own = {
        mask: {name: share for name, share in of.items() if name.endswith(f".{kind}")}
        for mask, of in found.items()
    }
    return {mask: of for mask, of in own.items() if of}


def _depth(name: str) -> tuple[int, list[tuple[bool, str | int]]]:
    """Sort key: a structure's place in the forward pass, with numbers compared as numbers."""
    block = next((i for i, part in enumerate(ORDER) if name.startswith(part)), len(ORDER))
    parts = re.split(r"[.]", name)
    return block, [(part.isdigit(), int(part) if part.isdigit() else part) for part in parts]


def _short(name: str) -> str:
    """`down_blocks.1.attentions.0.transformer_blocks.0.attn1.heads` -> `down 1.0.0 attn1`."""
    owner = name.rpartition(".")[0]
    owner = owner.removeprefix("single_transformer_blocks.").removeprefix("transformer_blocks.")
    kind = "single " if name.startswith("single") else "double " if owner[0].isdigit() else ""
    for long, short in (
        ("_blocks", ""),
        ("_block", ""),
        (".attentions", ""),
        (".transformer", ""),
    ):
        owner = owner.replace(long, short)
    numbers = re.sub(r"\.(?=[a-z])", " ", re.sub(r"^([a-z]+)\.", r"\1 ", owner))
    return kind + numbers
