"""Pictures as people have them, as 8-bit RGB. Imports no torch."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ecodiff.runtime.errors import UserError, first_line
from ecodiff.runtime.reading import read_bytes


def read_picture(path: str | Path, size: tuple[int, int] | None = None) -> Image.Image:
    """An RGB picture, upright as its EXIF data says, the first frame of several.

    What is transparent is laid on white; 16 bits a channel are scaled to 8.

    Args:
        size: (width, height) to cut the picture to, around its centre with its aspect kept.

    Raises:
        UserError: the file is missing, no whole picture, or larger than Pillow deems safe.
    """
    data = io.BytesIO(read_bytes(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = _rgb(ImageOps.exif_transpose(Image.open(data)))
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: cannot be read: it is no picture of a known kind") from None
    except Exception as error:  # damaged files make decoders raise whatever comes first
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    if size is None or picture.size == size:
        return picture
    return ImageOps.fit(picture, size, method=Image.Resampling.LANCZOS)


def _rgb(picture: Image.Image) -> Image.Image:
    """Any of Pillow's modes as RGB; ValueError for levels of unknown scale."""
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        levels = np.asarray(picture).astype(np.int64)
        levels[levels == picture.info.get("transparency")] = 65535  # a grey level that is clear
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("its levels are not of 16 bits")
        picture = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("its levels are floating-point numbers, which have no white")
    elif picture.has_transparency_data:
        clear = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return picture.convert("RGB")
