"""One image file: every usual kind becomes the same RGB pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastalex.data.decode import read_image
from tests._pictures import save, smooth

RED, BLUE = (200, 30, 40), (20, 60, 210)


@pytest.mark.parametrize("suffix", [".jpg", ".PNG", ".webp", ".bmp", ".tiff"])
def test_kinds_of_files_give_the_same_picture(tmp_path: Path, suffix: str) -> None:
    pixels = smooth(48, 48)
    options = {".jpg": {"quality": 95, "subsampling": 0}, ".webp": {"lossless": True}}
    got = read_image(save(tmp_path / f"a{suffix}", pixels, **options.get(suffix, {})), 48)
    assert got.shape == (48, 48, 3)
    assert got.dtype == np.uint8
    # At quality 95 a smooth picture is off by a few levels.
    np.testing.assert_allclose(got.astype(int), pixels, atol=6 if suffix == ".jpg" else 0)


@pytest.mark.parametrize(("width", "height"), [(90, 60), (60, 90), (61, 240), (7, 9), (1, 1)])
def test_the_shorter_side_is_resized_and_the_centre_kept(
    tmp_path: Path, width: int, height: int
) -> None:
    """Against a crop made first, at the very same place, and resized by another filter."""
    pixels = smooth(width, height)
    got = read_image(save(tmp_path / "a.png", pixels), 24).astype(int)
    short = min(width, height)
    # The centres of 24 x 24 squares, looked up where the picture is a function of its place.
    place = (np.arange(24) + 0.5) / 24 * short - 0.5
    x = np.clip(place + (width - short) / 2, 0, width - 1) / max(width - 1, 1)
    y = np.clip(place + (height - short) / 2, 0, height - 1) / max(height - 1, 1)
    expected = np.stack(
        np.broadcast_arrays(
            40 + 170 * x[None], 30 + 190 * y[:, None], 220 - 180 * x[None] * y[:, None]
        ),
        -1,
    )
    # Averaging flattens the ramp in the outermost pixels only; rounding adds one level.
    np.testing.assert_allclose(got[2:-2, 2:-2], expected[2:-2, 2:-2], atol=3)


def test_a_large_jpeg_decoded_small_looks_as_if_decoded_whole(tmp_path: Path) -> None:
    path = save(tmp_path / "large.jpg", smooth(1200, 900), quality=95)
    whole = Image.open(path).resize((100, 100), Image.Resampling.BOX, (150, 0, 1050, 900))
    difference = np.abs(read_image(path, 100).astype(int) - np.asarray(whole).astype(int))
    assert difference.max() <= 3  # of 255; the picture spans 40 to 210


def two_tone(size: int = 32) -> Image.Image:
    image = Image.new("RGB", (size, size), RED)
    image.paste(BLUE, (size // 2, 0, size, size))
    return image


def halves(path: Path) -> tuple[list[int], list[int]]:
    got = read_image(path, 32)
    return got[16, 8].tolist(), got[16, 24].tolist()


def test_grey_palette_and_transparent_pictures_become_rgb(tmp_path: Path) -> None:
    grey = save(tmp_path / "grey.png", two_tone().convert("L"))
    luma = [round(0.299 * r + 0.587 * g + 0.114 * b) for r, g, b in (RED, BLUE)]
    assert halves(grey) == ([luma[0]] * 3, [luma[1]] * 3)
    palette = save(tmp_path / "palette.png", two_tone().quantize(2))
    assert halves(palette) == (list(RED), list(BLUE))
    bilevel = save(tmp_path / "bilevel.png", two_tone().convert("L").point(lambda v: v > 64, "1"))
    assert halves(bilevel) == ([255] * 3, [255 * (luma[1] > 64)] * 3)


def test_transparent_parts_turn_white(tmp_path: Path) -> None:
    rgba = two_tone().convert("RGBA")
    rgba.putalpha(Image.new("L", (32, 32), 255))
    rgba.paste((*BLUE, 0), (16, 0, 32, 32))
    assert halves(save(tmp_path / "rgba.png", rgba)) == (list(RED), [255] * 3)
    half = two_tone().convert("RGBA")
    half.paste((0, 0, 0, 51), (16, 0, 32, 32))  # a fifth black on white
    assert halves(save(tmp_path / "half.png", half)) == (list(RED), [204] * 3)
    indexed = two_tone().quantize(2)
    at = indexed.getpixel((24, 16))
    path = save(tmp_path / "indexed.png", indexed, transparency=at)
    assert halves(path) == (list(RED), [255] * 3)
    la = Image.merge("LA", (two_tone().convert("L"), rgba.getchannel("A")))
    assert halves(save(tmp_path / "la.png", la))[1] == [255] * 3


def test_cmyk_as_adobe_writes_it(tmp_path: Path) -> None:
    """Inverted in the file: no ink is 255. Read without that, white paper would turn black."""
    image = Image.new("CMYK", (32, 32), (0, 0, 0, 0))
    image.paste((0, 255, 255, 0), (16, 0, 32, 32))
    path = save(tmp_path / "cmyk.jpg", image, quality=95)
    assert b"Adobe" in path.read_bytes()
    left, right = halves(path)
    np.testing.assert_allclose(left, [255, 255, 255], atol=4)
    np.testing.assert_allclose(right, [255, 0, 0], atol=4)


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    path = save(tmp_path / "deep.png", levels * np.uint16(257))
    expected = np.repeat(levels[..., None], 3, -1)
    np.testing.assert_array_equal(read_image(path, 16), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "tif", "png"])
def test_exif_rotation_is_applied(tmp_path: Path, suffix: str, orientation: int) -> None:
    """Once: Pillow turns a TIFF as it is loaded, and nothing else."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if suffix == "jpg" else {}
    path = save(tmp_path / f"turned.{suffix}", smooth(60, 44), exif=exif, **options)
    upright = save(tmp_path / "upright.png", ImageOps.exif_transpose(Image.open(path)))
    # 40 is more than half of 44, so that the JPEG is decoded whole.
    got, expected = (read_image(p, 40).astype(int) for p in (path, upright))
    # The same pixels in another order, turned after resizing or before: rounding only.
    np.testing.assert_allclose(got, expected, atol=1)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_metadata_does_not_lose_the_picture(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", two_tone(), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff", quality=95)
    left, right = halves(path)
    np.testing.assert_allclose([left, right], [RED, BLUE], atol=5)
