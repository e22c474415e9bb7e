"""Exact sums over images, which give a packed set its mean image and its covariance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

# A tile is a few lines of a few images, to stay in a core's cache: of at most 258, whose products
# stay below 2^24, where float32 is exact.
_IMAGES, _LINES = 16, 8


@dataclass
class Moments:
    """First and second moments of images, as exact sums: the same in whatever order.

    Attributes:
        images: how many.
        pixels: float64 [size, size, 3], the sum of each pixel.
        products: float64 [3, 3], the sum over all pixels of the products of two channels.
    """

    images: int
    pixels: npt.NDArray[np.float64]
    products: npt.NDArray[np.float64]

    @classmethod
    def zero(cls, size: int) -> Moments:
        return cls(0, np.zeros((size, size, 3)), np.zeros((3, 3)))

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Moments:
        """The inverse of ``arrays``."""
        pixels = arrays["pixels"].astype(np.float64)
        return cls(int(arrays["images"]), pixels, arrays["products"])

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What to save; the pixels' sums in half the bytes, which are enough for a shard's."""
        pixels = self.pixels.astype(np.uint32)
        return {"images": np.array(self.images), "pixels": pixels, "products": self.products}

    def merge(self, other: Moments) -> None:
        self.images += other.images
        self.pixels += other.pixels
        self.products += other.products

    def add(self, images: npt.NDArray[np.uint8]) -> None:
        """Add images, uint8 [n, size, size, 3].

        A line holds r g b r g b ..., so that its product with itself, moved by 0, 1 or 2 places,
        holds every product of two channels of a pixel, and no channel is taken out first. A tile
        is added up line by line.
        """
        size = len(self.pixels)
        images = np.asarray(images).reshape(-1, size, 3 * size)  # slices of a memmap are slow
        pixels = self.pixels.reshape(size, -1)
        room = np.zeros(_IMAGES * _LINES * 3 * size + 2, np.float32)
        totals = np.zeros((3, 3 * size))  # of products, by places moved and place in the line
        for first in range(0, len(images), _IMAGES):
            for top in range(0, size, _LINES):
                tile = images[first : first + _IMAGES, top : top + _LINES]
                pixels[top : top + _LINES] += np.add.reduce(tile, 0, np.uint16)
                lines = room[: tile.size].reshape(-1, 3 * size)
                np.copyto(lines.reshape(tile.shape), tile)
                strides = (room.itemsize, *lines.strides)
                moved = as_strided(room, (3, *lines.shape), strides)
                totals += np.einsum("yk,syk->sk", lines, moved)
        for shift in range(3):
            for channel in range(3 - shift):
                total = totals[shift, channel::3].sum()
                self.products[channel, channel + shift] += total
                if shift:
                    self.products[channel + shift, channel] += total
        self.images += len(images)

    def mean_image(self) -> npt.NDArray[np.float64]:
        """[size, size, 3], 0 to 255."""
        return self.pixels / self.images

    def mean_and_covariance(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """float64 [3] and [3, 3]: of the channels, over all pixels."""
        count = self.images * self.pixels[..., 0].size
        mean = self.pixels.sum((0, 1)) / count
        return mean, self.products / count - np.outer(mean, mean)
