"""Pictures and image files for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image


def smooth(width: int, height: int) -> npt.NDArray[np.uint8]:
    """A picture without sharp edges, so that JPEG and resizing hardly change it."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    channels = [40 + 170 * x, 30 + 190 * y, 220 - 180 * x * y]
    return np.stack(channels, -1).round().astype(np.uint8)


def save(path: Path, pixels: npt.NDArray[np.generic] | Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path
