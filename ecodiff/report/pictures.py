"""Figures drawn as pictures: the images of variants, and a map of the units that were removed."""

from __future__ import annotations

import re
import textwrap

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ecodiff.config.variants import Variant
from ecodiff.report.results import Results
from ecodiff.report.style import colour, label, method
from ecodiff.runtime.errors import UserError

KINDS = {
    "heads": "Attention heads",
    "neurons": "FFN neurons",
    "modulation": "Modulation channels",
}
GAP = 6  # white pixels between images
MAX_TICKS = 45  # number of structure names that fit below a panel
ORDER = ("down", "transformer_blocks", "mid", "single", "up")  # of blocks in a forward pass


def pictures(results: Results, model: str) -> Figure:
    """The images of the first prompts: one row per prompt, one column per variant."""
    variants, chosen = results.shown(model), results.captions().iloc[: results.examples]
    cells = [[results.picture(model, v, index) for v in variants] for index in chosen.index]
    odd = [
        f"prompt {index}, {variant.name}: {picture.shape}"
        for index, line in zip(chosen.index, cells, strict=True)
        for variant, picture in zip(variants, line, strict=True)
        if picture.shape != cells[0][0].shape
    ]
    if odd:
        raise UserError(f"report: pictures of {model} differ in size: {odd[0]}")
    height, width = (side + GAP for side in cells[0][0].shape[:2])
    mosaic = np.full((height * len(chosen), width * len(variants), 3), 255, dtype=np.uint8)
    for row, pictures_of_prompt in enumerate(cells):
        for column, picture in enumerate(pictures_of_prompt):
            place = mosaic[row * height : (row + 1) * height, column * width : (column + 1) * width]
            place[:-GAP, :-GAP] = picture
    figure, axis = plt.subplots(figsize=(len(variants) + 2.4, len(chosen) * height / width + 0.8))
    axis.imshow(mosaic, interpolation="none")
    axis.spines[:].set_visible(False)
    axis.grid(visible=False)
    axis.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    columns, rows = (np.arange(len(of)) for of in (variants, chosen))
    captions = ["\n".join(textwrap.wrap(caption, 28)[:4]) for caption in chosen]
    # A dollar sign in a caption begins no formula.
    places = (rows + 0.5) * height - GAP / 2
    axis.set_yticks(places, captions, fontsize=8.5, parse_math=False)
    axis.set_xticks((columns + 0.5) * width - GAP / 2, map(_header, variants), fontsize=8.5)
    for text, variant in zip(axis.get_xticklabels(), variants, strict=True):
        text.set(color=colour(variant), fontweight="bold")
    figure.suptitle(f"{model}: the same prompts and starting noise", fontsize=12)
    return figure


def _header(variant: Variant) -> str:
    share = "" if variant.is_dense else f"\n{variant.percent} %"
    name, *more = method(variant).replace("least squares", "least sq.").split(" + ")
    return "\n".join([*textwrap.wrap(name, 11), *(f"+ {one}" for one in more)]) + share


def removed(results: Results, model: str) -> Figure:
    """The share of units removed from each structure: one panel per kind, one row per mask."""
    masks = results.masks(model)
    found = {mask: results.removed(model, mask) for mask in masks}
    names = sorted(next(iter(found.values())), key=_depth)
    kinds = [kind for kind in KINDS if any(name.endswith(f".{kind}") for name in names)]
    width = min(18.0, 4 + 0.28 * max(sum(n.endswith(f".{k}") for n in names) for k in kinds))
    figure, axes = plt.subplots(
        len(kinds), 1, figsize=(width, len(kinds) * (1.9 + 0.24 * len(masks))), squeeze=False
    )
    for axis, kind in zip(axes[:, 0], kinds, strict=True):
        own = [name for name in names if name.endswith(f".{kind}")]
        shares = np.array([[100 * found[mask][name] for name in own] for mask in masks])
        image = axis.imshow(shares, aspect="auto", cmap="cividis_r", vmin=0, vmax=100)
        every = -(-len(own) // MAX_TICKS)
        axis.set_xticks(range(0, len(own), every), [_short(name) for name in own[::every]])
        axis.tick_params(axis="x", rotation=90, labelsize=8)
        axis.set_yticks(range(len(masks)), [label(mask) for mask in masks])
        axis.set(title=KINDS[kind], xlabel="Layer, in the order of the forward pass")
        axis.grid(visible=False)
    bar = figure.colorbar(image, ax=axes[:, 0], shrink=0.8)
    bar.set_label("Units removed (% of the layer)")
    figure.suptitle(f"{model}: what was removed from each layer", fontsize=13)
    return figure


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
