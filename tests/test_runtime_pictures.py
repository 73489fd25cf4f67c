import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ecodiff.runtime.errors import UserError
from ecodiff.runtime.pictures import read_picture

LEVELS = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)  # 0, 100 and 255 of 8 bits


def read(path, **options):
    return np.asarray(read_picture(path, **options)).tolist()


def grey(*levels):
    return [[[level] * 3 for level in levels]]


def refused(path):
    with pytest.raises(UserError) as error:
        read_picture(path)
    text = str(error.value)
    assert text.startswith(str(path)) and "\n" not in text
    return text.removeprefix(str(path))


def png(depth, colour, row, *chunks):
    """A PNG of one row, by its samples; Pillow writes no colours of 16 bits."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    head = struct.pack(">IIBBBBB", len(row) // channels, 1, depth, colour, 0, 0, 0)
    data = b"\0" + struct.pack(f">{len(row)}{'H' if depth == 16 else 'B'}", *row)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_as_their_exif_says(tmp_path, orientation):
    upright = Image.new("RGB", (16, 24))
    upright.putpixel((0, 0), (255, 255, 255))
    upright.paste("white", (0, 0, 8, 16))
    stored = {
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.rotate(180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.rotate(90, expand=True),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.rotate(-90, expand=True),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "p.png", exif=exif)
    assert read(tmp_path / "p.png") == np.asarray(upright).tolist()


@pytest.mark.parametrize(
    ("levels", "name", "mode"),
    [
        (LEVELS, "p.png", "I;16"),
        (LEVELS, "p.tiff", "I;16"),
        (LEVELS.astype(">u2"), "p.tiff", "I;16B"),
        (LEVELS, "p.pgm", "I"),
        (LEVELS.astype(np.int32), "p.tiff", "I"),
    ],
)
def test_sixteen_bits_of_grey_are_scaled(tmp_path, levels, name, mode):
    Image.fromarray(levels).save(tmp_path / name)
    assert Image.open(tmp_path / name).mode == mode
    assert read(tmp_path / name) == grey(0, 100, 255)


def test_sixteen_bits_of_colour_are_scaled(tmp_path):
    (tmp_path / "p.png").write_bytes(png(16, 2, [0, 257 * 100, 65535]))
    assert read(tmp_path / "p.png") == [[[0, 100, 255]]]


@pytest.mark.parametrize(
    ("data", "mode", "seen"),
    [
        (png(8, 4, [7, 255, 7, 0, 0, 51]), "LA", grey(7, 255, 204)),
        (png(8, 6, [7, 8, 9, 255, 7, 8, 9, 0]), "RGBA", [[[7, 8, 9], [255] * 3]]),
        (png(16, 6, [0, 257 * 100, 65535, 0]), "RGBA", grey(255)),
        (png(8, 0, [7, 8], (b"tRNS", b"\0\7")), "L", grey(255, 8)),
        (png(8, 2, [7, 8, 9] * 2, (b"tRNS", b"\0\7\0\x08\0\x09")), "RGB", grey(255, 255)),
        (png(16, 0, [257 * 7, 257 * 8], (b"tRNS", b"\7\7")), "I;16", grey(255, 8)),
    ],
)
def test_what_is_clear_is_white(tmp_path, data, mode, seen):
    (tmp_path / "p.png").write_bytes(data)
    assert Image.open(tmp_path / "p.png").mode == mode
    assert read(tmp_path / "p.png") == seen


@pytest.mark.parametrize("transparency", [0, b"\0\xff"])
def test_a_palette_may_be_clear(tmp_path, transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putdata([0, 1])
    image.save(tmp_path / "p.png", transparency=transparency)
    assert read(tmp_path / "p.png") == [[[255] * 3, [10, 20, 30]]]


@pytest.mark.parametrize(
    ("mode", "white", "name"),
    [("1", 1, "p.png"), ("P", 255, "p.png"), ("CMYK", (0, 0, 0, 0), "p.jpg"), ("L", 255, "p.bmp")],
)
def test_white_is_white_in_any_mode(tmp_path, mode, white, name):
    image = (
        Image.new("L", (8, 8), 255).convert("P") if mode == "P" else Image.new(mode, (8, 8), white)
    )
    image.save(tmp_path / name)
    assert Image.open(tmp_path / name).mode == mode
    assert np.asarray(read_picture(tmp_path / name)).min() == 255


@pytest.mark.parametrize("name", ["p.gif", "p.png", "p.webp"])
def test_the_first_frame_is_shown(tmp_path, name):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    first.save(tmp_path / name, save_all=True, append_images=[second])
    assert Image.open(tmp_path / name).n_frames == 2
    red, _, blue = read(tmp_path / name)[0][0]
    assert red > 250 and blue < 5


def test_a_cut_keeps_the_aspect(tmp_path):
    tall = np.zeros((200, 100, 3), dtype=np.uint8)
    tall[50:150] = 255  # the central square
    Image.fromarray(tall).save(tmp_path / "tall.png")
    cut = np.asarray(read_picture(tmp_path / "tall.png", (32, 32)))
    assert cut.shape == (32, 32, 3)
    assert cut[2:-2].min() >= 254


@pytest.mark.parametrize("name", ["p.png", "p.jpg", "p.gif", "p.tiff", "p.bmp", "p.webp"])
def test_truncated_pictures_are_named(tmp_path, name):
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    for size in (1, 12, 40, len(data) // 2):
        (tmp_path / name).write_bytes(data[:size])
        refused(tmp_path / name)


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "p.png").write_text("no")
    assert refused(tmp_path / "p.png") == ": cannot be read: it is no picture of a known kind"
    assert refused(tmp_path / "none.png") == ": there is no such file"
    assert refused(tmp_path) == ": is a folder, not a file"


@pytest.mark.parametrize("side", [10_000, 15_000])  # Pillow warns of the one, and refuses the other
def test_bombs_are_named(tmp_path, side):
    Image.new("1", (side, side)).save(tmp_path / "p.png")
    assert "exceeds limit" in refused(tmp_path / "p.png")


@pytest.mark.parametrize("levels", [[[0, 70000]], [[-1, 5]], [[0.0, 1.0]]])
def test_levels_without_a_known_white_are_refused(tmp_path, levels):
    kind = np.float32 if isinstance(levels[0][0], float) else np.int32
    Image.fromarray(np.array(levels, dtype=kind)).save(tmp_path / "p.tiff")
    assert "its levels are" in refused(tmp_path / "p.tiff")


def test_any_bytes_are_a_picture_or_one_line(tmp_path):
    file = io.BytesIO()
    Image.new("P", (9, 9)).save(file, "PNG", transparency=b"\0\1")
    whole, rng = file.getvalue(), np.random.default_rng(0)
    for _ in range(100):
        data = bytearray(whole)
        for place in rng.integers(8, len(data), size=3):
            data[place] = rng.integers(256)
        (tmp_path / "p.png").write_bytes(data)
        try:
            assert read_picture(tmp_path / "p.png").mode == "RGB"
        except UserError as error:
            assert "\n" not in str(error)
