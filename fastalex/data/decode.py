"""One image file of any of the usual kinds, as RGB pixels of one size."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from fastalex.data.base import Pixels, retrying

T = TypeVar("T")

_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm"),
}
# What a file of each suffix, in lower case, is expected to hold.
FORMATS = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes}
_NO_MEMORY = "not enough memory to decode it"
# What ``why`` says of a disk, a network or a machine, and not of a file.
PASSING = frozenset({_NO_MEMORY, *(os.strerror(code).lower() for code in errno.errorcode)})
# The only decoders that a file reaches, whatever its name: others start programs (EPS) or are rare.
_DECODERS = tuple(_SUFFIXES)
_MEMORY = 360_000_000  # bytes that decoding one file may take
_MOST_BYTES = _MEMORY // 3  # of a file: some decoders hold it twice
_MOST_WHOLE = 1 << 24  # pixels of what `read_upright` returns
_STRIP = 1 << 18  # pixels that are converted at a time
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

    Only the formats in ``FORMATS`` are decoded, and no file that would take more than 400 MB: its
    header tells the size. What Pillow raises for a file that it can't decode, ``why`` words.
    """
    with _opened(path) as image:
        # A JPEG is decoded at a half, quarter or eighth where that is still no smaller than asked.
        _draft(image, (size, size))
        return centre_square(image, size)


def read_whole(path: Path, size: int) -> tuple[Pixels, str | None]:
    """As ``read_image``, from every pixel of the file, and what is odd about it.

    ``read_image`` lets the JPEG decoder halve a large picture first, which is quicker and changes
    fine texture by a few levels. Here nothing is left to the decoder.

    Returns:
        uint8 [size, size, 3] RGB, and a remark: a format that is not the suffix's, CMYK, more than
        8 bits, several pictures, an extreme size or shape; None for an ordinary file.
    """
    with _opened(path) as image:
        _require_memory(image, image.width * image.height)
        deep = any(";16" in str(tile.args) for tile in image.tile)  # known until it is decoded
        return centre_square(image, size), _remark(image, path.suffix.lower(), size, deep)


def read_upright(path: Path) -> Image.Image:
    """All of an image file, RGB, converted and turned as by ``read_image``.

    One of more than 16 million pixels is reduced to fewer, by a whole number.
    """
    with _opened(path) as image:
        shrink = _shrink(image)
        _draft(image, (image.width // shrink, image.height // shrink))
        rgb, orientation = _to_rgb(image), _orientation(image)
    del image  # what it was converted from
    shrink = _shrink(rgb)
    return _turned(rgb if shrink == 1 else rgb.reduce(shrink), orientation)


def try_read(read: Callable[[Path, int], T], path: Path, size: int) -> T | str:
    """``read(path, size)``, or why the file can't be read, after some tries if it is the disk."""
    try:
        if path.stat().st_size == 0:
            return "empty file"
        return retrying(lambda: read(path, size))
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
        return _NO_MEMORY
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """An image of which nothing but the header is read."""
    if (length := path.stat().st_size) > _MOST_BYTES:
        raise ValueError(
            f"{length / 1e6:,.0f} MB, more than the {_MOST_BYTES / 1e6:.0f} MB allowed"
        )
    with Image.open(path, formats=_DECODERS) as image:
        yield image


def _draft(image: ImageFile.ImageFile, size: tuple[int, int]) -> None:
    """Let the JPEG decoder reduce the image to no less than ``size``, if there is memory for it."""
    whole = image.width * image.height
    image.draft(None, size)
    # Of one file `read_image` and `read_upright` ask for other sizes, and are to say the same.
    least = min(whole, _MOST_WHOLE) if image.format in ("JPEG", "MPO") else whole
    _require_memory(image, whole, max(least, image.width * image.height))


def _require_memory(image: Any, whole: int, decoded: int | None = None) -> None:
    """Raise ValueError where decoding takes too much memory.

    The file has ``whole`` pixels, of which its decoder returns ``decoded``, or all.
    """
    length = Path(image.filename).stat().st_size
    needed = _pixel_bytes(image) * (whole if decoded is None else decoded) + length
    needed += 16 * image.height + 8 * image.width  # pointers to the rows; a decoder's row buffers
    if image.tile and image.tile[0][0] == "libtiff":
        needed += _tiff_buffer(image) + length
    elif image.format == "WEBP":
        needed += length
    elif image.format in ("JPEG", "MPO") and not _in_one_scan(image):  # holds all coefficients
        factors = [h * v for _, h, v, _ in image.layer]
        needed += 2 * whole * sum(factors) // max(factors)
    if needed > _MEMORY:
        raise ValueError(
            f"{whole:,} pixels take {needed / 1e6:,.0f} MB to decode, more than the "
            f"{_MEMORY / 1e6:.0f} MB allowed"
        )


def _pixel_bytes(image: ImageFile.ImageFile) -> int:
    """What a pixel takes as it is decoded and converted; measured, where a decoder needs more."""
    decoded = {"1": 1, "L": 1, "P": 1}.get(image.mode, 2 if image.mode.startswith("I;16") else 4)
    if image.mode != "RGB" or "transparency" in image.info:
        decoded += 4
    if image.format == "WEBP":
        decoded += 12
    if image.tile and image.tile[0][0] in ("ppm", "ppm_plain", "bmp_rle"):
        decoded += 6
    if image.format == "TIFF" and _orientation(image) != 1:  # turned as it is loaded
        decoded += 4
    return decoded


def _tiff_buffer(image: Any) -> int:
    """Bytes of a strip or a tile, which is decoded at once."""
    tags = image.tag_v2
    width = tags.get(322, image.width)
    rows = tags.get(323, min(tags.get(278, image.height), image.height))
    bits = max(tags.get(258, (1,))) * tags.get(277, 1)
    return int(width * rows * max(4, bits / 8))


def _in_one_scan(image: Any) -> bool:
    """Whether a JPEG's first scan has all channels, whole, so that it is decoded row by row."""
    if "progressive" in image.info:
        return False
    length = 6 + 2 * len(image.layer)
    image.fp.seek(-length - 2, 1)  # the header ends behind the marker of the first scan
    marker = image.fp.read(length + 2)
    return bool(marker[:5] == bytes([0xFF, 0xDA, 0, length, len(image.layer)]))


def _shrink(image: Image.Image) -> int:
    """By how much an image is reduced that is to have no more than ``_MOST_WHOLE`` pixels."""
    pixels = image.width * image.height
    return next(by for by in (1, 2, 4, 8, 16) if pixels <= by * by * _MOST_WHOLE)


def centre_square(image: Image.Image, size: int) -> Pixels:
    rgb = _to_rgb(image)
    orientation = _orientation(image)
    short = min(rgb.size)
    left, top = ((side - short) / 2 for side in rgb.size)
    box = (left, top, left + short, top + short)
    square = rgb.resize((size, size), Image.Resampling.BILINEAR, box)
    return np.asarray(_turned(square, orientation))


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    turn = _UPRIGHT.get(orientation)
    return image if turn is None else image.transpose(turn)


def _remark(image: ImageFile.ImageFile, suffix: str, size: int, deep: bool) -> str | None:
    kind = "JPEG" if image.format == "MPO" else image.format  # what some cameras write
    pictures = _or_one(lambda: getattr(image, "n_frames", 1))
    (width, height), (short, long) = image.size, sorted(image.size)
    remarks = {
        f"{kind} under the name of a {FORMATS.get(suffix)}": kind != FORMATS.get(suffix, kind),
        "CMYK": image.mode == "CMYK",
        "16 bits a channel, of which 8 are kept": deep,
        f"the first of {pictures} pictures": pictures > 1,
        f"{width} x {height} pixels, enlarged": size > _EXTREME * short,
        f"{width} x {height} pixels, nearly all outside the centre": long > _EXTREME * short,
    }
    return "; ".join(remark for remark, holds in remarks.items() if holds) or None


def _orientation(image: Image.Image) -> int:
    return _or_one(lambda: image.getexif().get(_ORIENTATION, 1))


def _or_one(read: Callable[[], Any]) -> int:
    try:
        return int(read())
    except Exception:  # broken metadata raises all sorts of errors, and the pixels are still good
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed white")
    image.load()  # some formats know their size or mode only then, or turn the picture
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    width, height = image.size
    rows = max(1, _STRIP // width)
    if rows >= height:
        return _converted(image)
    rgb = Image.new("RGB", image.size)
    for top in range(0, height, rows):  # a strip at a time: there are several copies of it
        rgb.paste(_converted(image.crop((0, top, width, min(top + rows, height)))), (0, top))
    return rgb


def _converted(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip
        values = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
