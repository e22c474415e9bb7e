"""Augmentation: what is done to a batch of bytes on the device, and the noise of its colours.

Crop, mirror and colour of an image are functions of (seed, epoch, index) alone, drawn with the
batch. ``Augment`` applies them and draws nothing itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

import fastalex_kernels as kernels
from fastalex.data.base import ImageDataset, Pixels
from fastalex.data.normalization import Normalization

AUGMENTATIONS = {
    "none": "the centre crop",
    "crop": "a random crop, mirrored half the time (P§4.1)",
    "full": "crop, mirror and the colour noise of P§4.1",
    "resized": "a random part of .08 to 1 of the area, of any shape from 3/4 to 4/3, resized and "
    "mirrored half the time, as torchvision does",
}

COLOR_NOISES = {
    "published": "the authors' numbers for ImageNet",
    "measured": "computed from the covariance of a packed set",
}
_COLOR_SHARE = 0.1  # deviation of alpha, P§4.1

# With colour noise the authors divide the zero-mean image by this, so that what the net sees in
# training has the scale of what it sees in validation. Source: S:convdata_jpeg.py.
COLOR_SCALE = 1 + _COLOR_SHARE


class Augment:
    """Crops, mirrors, colours and normalises a batch, on the device that it is made for.

        y = (crop + color - mean) / std, mirrored where asked

    No value of its arguments is read by the host, so that a CUDA graph can hold a call.

    Args:
        normalization: mean and deviation; its mean image, if any, has the side of the images.
        size: side in pixels of what comes out.
        device: of the batches.
        colored: whether batches have colour noise.

    Attributes:
        norm: what ``fastalex_kernels.augment`` takes under this name.

    Raises:
        ValueError: where the mean image is smaller than ``size``.

    Source: P§2, P§4.1.
    """

    def __init__(
        self, normalization: Normalization, size: int, device: torch.device, colored: bool = False
    ) -> None:
        self.size = size
        std = torch.tensor(normalization.std) * (COLOR_SCALE if colored else 1.0)
        image = normalization.mean_image
        if image is not None and len(image.pixels) < size:
            side = len(image.pixels)
            raise ValueError(f"size: expected at most the mean image's {side}, got {size}")
        mean = torch.tensor(normalization.mean if image is None else image.pixels, device=device)
        centred = image is not None and image.centred
        self.norm = kernels.PixelNorm(mean, (1 / std).to(device), centred)

    def __call__(
        self,
        images: torch.Tensor,
        tops: torch.Tensor,
        lefts: torch.Tensor,
        mirrors: torch.Tensor,
        colors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The batch as images, [n, 3, size, size], stored channels last.

        They are float32, or under autocast its dtype, as the first layer would round them.

        Args:
            images: uint8 [n, D, D, 3].
            tops, lefts: int32 or int64 [n], the first row and column of each crop.
            mirrors: bool [n], which crops are mirrored left to right.
            colors: float32 [n, 3], added to every pixel of an image, 0 to 255; or None.
        """
        kind = images.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        crops = kernels.Crops(tops, lefts, mirrors)
        return kernels.augment(images, crops, colors, self.norm, self.size, dtype)

    def crop(
        self, images: torch.Tensor, top: int, left: int, mirrored: bool = False
    ) -> torch.Tensor:
        """The same crop of every image, else as a call."""
        count = (len(images),)
        tops, lefts = (images.new_full(count, place, dtype=torch.int32) for place in (top, left))
        return self(images, tops, lefts, images.new_full(count, mirrored, dtype=torch.bool))


class ColorNoise(NamedTuple):
    """The principal components of the pixels of a data set, on the scale 0 to 255."""

    std: npt.NDArray[np.float64]  # [3], square roots of the covariance's eigenvalues
    vectors: npt.NDArray[np.float64]  # [3, 3], its eigenvectors as columns

    @classmethod
    def measured(cls, covariance: npt.NDArray[np.float64]) -> ColorNoise:
        """The components of pixels with a ``covariance``, float64 [3, 3]."""
        values, vectors = np.linalg.eigh(covariance)
        # Either direction is an eigenvector: one rule, so that every machine draws the same.
        largest = vectors[np.abs(vectors).argmax(0), range(3)]
        return cls(np.sqrt(np.maximum(values, 0)), vectors * np.sign(largest))

    def draw(self, words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float32]:
        """float32 [N, 3]: what P§4.1 adds to the pixels of each image, of words [N, 4] of 64 bits.

        sum over i of alpha_i s_i p_i, alpha normal of deviation .1, s the square root of an
        eigenvalue of the covariance of the pixels and p its eigenvector. The paper prints the
        eigenvalue itself; its authors' program takes the root (S:convdata_jpeg.py), as here.
        """
        uniforms = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # never 0
        radius, angle = np.sqrt(-2 * np.log(uniforms[:, :2])), 2 * np.pi * uniforms[:, 2:]
        normals = np.stack([radius[:, 0], radius[:, 0], radius[:, 1]], 1) * np.stack(
            [np.cos(angle[:, 0]), np.sin(angle[:, 0]), np.cos(angle[:, 1])], 1
        )
        noise: npt.NDArray[np.float64] = (_COLOR_SHARE * normals * self.std) @ self.vectors.T
        return noise.astype(np.float32)


# Of the ILSVRC-2012 training images. Source: C2:make-data/input_meta.
PUBLISHED_NOISE = ColorNoise(
    np.array([19.7208, 37.0939, 121.7801]),
    np.array(
        [
            [0.41796, -0.71258, -0.56351],
            [-0.81698, -0.02354, -0.57618],
            [0.39731, 0.70120, -0.59200],
        ]
    ),
)


SCALES = (0.08, 1.0)  # share of the image's area
RATIOS = (3 / 4, 4 / 3)  # width to height
_BOX_TRIES = 10
BOX_WORDS = 2 * _BOX_TRIES + 2  # random 64-bit words for a box


def draw_box(words: npt.NDArray[np.uint64], width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a part of an image of so many pixels.

    Its area is uniform in ``SCALES`` and the logarithm of its shape in ``RATIOS``, as the ``words``
    [BOX_WORDS] of 64 bits say. What does not fit is drawn again; after ten tries it is the largest
    centre part of a shape within ``RATIOS``.

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
    dataset: ImageDataset, index: int, words: npt.NDArray[np.uint64], side: int, size: int
) -> Pixels:
    """A random part of an image, uint8 [size, size, 3]; ``words`` decide it, see ``draw_box``.

    ``side`` is what an image is decoded at that has no size of its own.
    """
    whole = dataset.whole(index, side)
    # Cut first: resizing a box of a larger image would mix in what is around it.
    part = whole.crop(draw_box(words, *whole.size))
    return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))
