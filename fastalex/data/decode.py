"""One image file of any of the usual kinds, as RGB pixels of one size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastalex.data.base import Pixels

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
        orientation = _orientation(image)
        # A JPEG is decoded at a half, quarter or eighth where that is still no smaller than asked.
        image.draft(None, (size, size))
        rgb = _to_rgb(image)
    short = min(rgb.size)
    left, top = ((side - short) / 2 for side in rgb.size)
    box = (left, top, left + short, top + short)
    square = rgb.resize((size, size), Image.Resampling.BILINEAR, box)
    if orientation in _UPRIGHT:
        square = square.transpose(_UPRIGHT[orientation])
    return np.array(square)


def why(error: Exception) -> str:
    """A few words on why ``read_image`` failed."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels to be safe"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return (str(error).splitlines() or [type(error).__name__])[0]


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
    return image.convert("RGB")
