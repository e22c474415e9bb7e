"""Random parts of an image at one size, as torchvision's RandomResizedCrop draws them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

from fastalex.data.base import ImageSource, Pixels

SCALES = (0.08, 1.0)  # share of the image's area
RATIOS = (3 / 4, 4 / 3)  # width to height
_TRIES = 10
WORDS = 2 * _TRIES + 2  # random 64-bit words for a box


def draw_box(words: npt.NDArray[np.uint64], width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a part of an image, in pixels.

    Its area is uniform in ``SCALES`` and the logarithm of its shape in ``RATIOS``. What does not
    fit is drawn again; after ten tries it is the largest centre part of a shape within ``RATIOS``.

    Args:
        words: [WORDS], any 64 bits each.
        width, height: of the image in pixels.

    Source: torchvision's transforms.RandomResizedCrop, get_params.
    """
    uniforms: Iterator[float] = iter(((words >> np.uint64(11)) * 2.0**-53).tolist())
    down, along = next(uniforms), next(uniforms)  # where it lies
    for share, shape in zip(uniforms, uniforms, strict=True):
        area = width * height * (SCALES[0] + (SCALES[1] - SCALES[0]) * share)
        low, high = map(math.log, RATIOS)
        ratio = math.exp(low + (high - low) * shape)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(along * (width - w + 1)), int(down * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * RATIOS[1])), min(height, round(width / RATIOS[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resized_crop(
    source: ImageSource, index: int, words: npt.NDArray[np.uint64], side: int, size: int
) -> Pixels:
    """A random part of an image, uint8 [size, size, 3].

    Args:
        source: whose image it is.
        index: of the image.
        words: decide the part, see ``draw_box``.
        side: what an image is decoded at that has no size of its own.
        size: side in pixels of what is returned.
    """
    whole = source.whole(index, side)
    # Cut first: resizing a box of a larger image would mix in what is around it.
    part = whole.crop(draw_box(words, *whole.size))
    return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))
