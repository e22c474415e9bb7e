"""One image file of any of the usual kinds, as RGB pixels of one size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from fastalex.data.base import Pixels

T = TypeVar("T")

# What a file of each suffix, in lower case, is expected to hold.
FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".ppm": "PPM",
    ".pgm": "PPM",
}
_EXTREME = 8  # enlarged, or longer than wide, by more than this is worth a remark
_ORIENTATION = 0x0112  # the EXIF tag
# What undoes each value of the tag, in Pillow's terms.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: Path, size: int) -> Pixels:
    """The centre square of an image file, as uint8 [size, size, 3] RGB.

    The shorter side becomes ``size``, smoothed as it shrinks, and the middle of the longer one is
    kept. EXIF rotation is applied, grey and palette become RGB, CMYK is converted (inverted too,
    as Adobe's programs write it), transparent parts turn white, 16-bit grey keeps its range, and of
    an animation the first picture is taken.

    Raises:
        Exception: what Pillow raises for a file it can't decode to the last row; ``why`` words it.
    """
    with Image.open(path) as image:
        # A JPEG is decoded at a half, quarter or eighth where that is still no smaller than asked.
        image.draft(None, (size, size))
        return _square(image, size)


def read_whole(path: Path, size: int) -> tuple[Pixels, str | None]:
    """As ``read_image``, from every pixel of the file, and what is odd about it.

    ``read_image`` lets the JPEG decoder halve a large picture first, which is quicker and changes
    fine texture by a few levels. Here nothing is left to the decoder.

    Returns:
        uint8 [size, size, 3] RGB, and a remark: a format that is not the suffix's, CMYK, more than
        8 bits, several pictures, an extreme size or shape; None for an ordinary file.

    Raises:
        Exception: as ``read_image``.
    """
    with Image.open(path) as image:
        deep = any(";16" in str(tile.args) for tile in image.tile)  # known until it is decoded
        return _square(image, size), _remark(image, path.suffix.lower(), size, deep)


def read_upright(path: Path) -> Image.Image:
    """All of an image file, RGB, converted and turned as by ``read_image``.

    Raises:
        Exception: as ``read_image``.
    """
    with Image.open(path) as image:
        orientation = _orientation(image)
        return _turned(_to_rgb(image), orientation)


def try_read(read: Callable[[Path, int], T], path: Path, size: int) -> T | str:
    """``read(path, size)``, or why the file can't be read."""
    try:
        if path.stat().st_size == 0:
            return "empty file"
        return read(path, size)
    except Exception as error:  # broken files make Pillow raise nearly anything
        return why(error)


def why(error: Exception) -> str:
    """A few words on why ``read_image`` failed."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels to be safe"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _square(image: Image.Image, size: int) -> Pixels:
    orientation = _orientation(image)
    rgb = _to_rgb(image)
    short = min(rgb.size)
    left, top = ((side - short) / 2 for side in rgb.size)
    box = (left, top, left + short, top + short)
    square = rgb.resize((size, size), Image.Resampling.BILINEAR, box)
    return np.asarray(_turned(square, orientation))


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    turn = _UPRIGHT.get(orientation)
    return image if turn is None else image.transpose(turn)


def _remark(image: ImageFile.ImageFile, suffix: str, size: int, deep: bool) -> str | None:
    remarks = []
    kind = "JPEG" if image.format == "MPO" else image.format  # what some cameras write
    if kind != FORMATS.get(suffix, kind):
        remarks.append(f"{kind} under the name of a {FORMATS[suffix]}")
    if image.mode == "CMYK":
        remarks.append("CMYK")
    if deep:
        remarks.append("16 bits a channel, of which 8 are kept")
    if _pictures(image) > 1:
        remarks.append(f"the first of {_pictures(image)} pictures")
    (width, height), (short, long) = image.size, sorted(image.size)
    if size > _EXTREME * short:
        remarks.append(f"{width} x {height} pixels, enlarged")
    if long > _EXTREME * short:
        remarks.append(f"{width} x {height} pixels, nearly all outside the centre")
    return "; ".join(remarks) or None


def _pictures(image: Image.Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # a later picture is broken, and the first one still good
        return 1


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken metadata raises all sorts of errors, and the pixels are still good
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip
        values = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed white")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    image.load()  # some formats know their size or mode only then
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies it
