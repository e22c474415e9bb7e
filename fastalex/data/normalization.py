"""How pixels are normalised: moments of images, channel means and deviations, the mean image."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fastalex.data.base import ImageDataset, Pixels

NORMALIZATIONS = {
    "unit": "zero mean and unit variance of each channel, measured on the training images",
    "mean": "the measured mean of each channel is subtracted, pixels stay 0 to 255",
    "mean-image": "likewise the mean image of a packed set, cropped and mirrored with each image",
    "mean-centre": "likewise its centre, from every crop",
    "imagenet": "torchvision's constants",
    "init-from": "as the net of --init-from has it, the default with that",
}
INIT_FROM = "init-from"
MEAN_IMAGES = ("mean-image", "mean-centre")  # those that subtract one where there is one

FloatPixels = npt.NDArray[np.float32]


class Moments:
    """First and second moments of the pixels of images, as exact sums: the same in whatever order.

    Attributes:
        pixels: uint32 [size, size, 3], the sum of each pixel; uint64 once merged.
        products: float64 [3, 3], the sum over all pixels of the products of two channels.
    """

    def __init__(self, size: int) -> None:
        self.images = 0
        self.pixels = np.zeros((size, size, 3), np.uint32)  # enough for 16 million images
        self.products = np.zeros((3, 3))

    def add(self, image: Pixels) -> None:
        """Add an image, uint8 [size, size, 3]."""
        self.images += 1
        self.pixels += image
        channels = np.ascontiguousarray(image.transpose(2, 0, 1), np.uint32)
        # A line's sums fit in 32 bits; summed pixel by pixel in 64 they take twice the time.
        lines = np.einsum("ayx,byx->aby", channels, channels)
        self.products += lines.sum(-1, dtype=np.float64)

    def merge(self, other: Moments) -> None:
        self.images += other.images
        self.pixels = np.add(self.pixels, other.pixels, dtype=np.uint64)
        self.products += other.products

    def mean_image(self) -> npt.NDArray[np.float64]:
        """[size, size, 3], 0 to 255."""
        return self.pixels / self.images

    def mean_and_covariance(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """float64 [3] and [3, 3]: of the channels, over all pixels."""
        count = self.images * self.pixels[..., 0].size
        mean = self.pixels.sum((0, 1)) / count
        return mean, self.products / count - np.outer(mean, mean)


@dataclass(frozen=True)
class MeanImage:
    """What is subtracted from images pixel by pixel, on the scale 0 to 255; equal by its pixels.

    Attributes:
        pixels: float32 [D, D, 3], of the side at which images are decoded.
        centred: whether its centre is subtracted from every crop, as the authors' program does
            (S:convdata_jpeg.py, data_mean_crop); else it is cropped and mirrored with each image
            (P§2 subtracts it from the whole image; C:src/caffe/data_transformer.cpp).
        sha256: of ``pixels``.
    """

    pixels: FloatPixels = field(compare=False, repr=False)
    centred: bool
    sha256: str

    @classmethod
    def of(cls, pixels: FloatPixels, side: int, centred: bool) -> MeanImage:
        """The mean of images of ``side``, where ``pixels`` [S, S, 3] is that of larger ones.

        Resizing is linear, so that the mean of resized images is the resized mean.
        """
        if len(pixels) != side:
            channels = [Image.fromarray(np.ascontiguousarray(pixels[..., c])) for c in range(3)]
            size = (side, side)
            resized = [np.asarray(c.resize(size, Image.Resampling.BILINEAR)) for c in channels]
            pixels = np.stack(resized, -1)
        pixels = np.ascontiguousarray(pixels, np.float32)
        return cls(pixels, centred, hashlib.sha256(pixels.data).hexdigest())


@dataclass(frozen=True)
class Normalization:
    """x -> (x - mean) / std per channel, on pixels from 0 to 255, or less a mean image instead."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mean_image: MeanImage | None = None

    @classmethod
    def measure(cls, dataset: ImageDataset, size: int, sample: int = 1000) -> Normalization:
        """What gives the images of ``dataset``, decoded at ``size``, zero mean and unit variance.

        A channel that never varies is left at its scale. At most ``sample`` images are looked at:
        one of each of as many equal parts, drawn at random, but always the same. So every class has
        its fair share, whether a dataset keeps classes together or in turn.
        """
        count = min(sample, len(dataset))
        edges = np.arange(count + 1) * len(dataset) // count
        chosen = np.random.default_rng(0).integers(edges[:-1], edges[1:])
        moments = Moments(size)
        for index in chosen.tolist():
            moments.add(dataset.image(index, size))
        mean, covariance = moments.mean_and_covariance()
        std = np.sqrt(np.maximum(covariance.diagonal(), 0.0))
        std[std < 0.5] = 1.0  # half a grey level: nothing but rounding
        return cls(tuple(mean.tolist()), tuple(std.tolist()))

    def scaled(self, kind: str, mean_image: MeanImage | None = None) -> Normalization:
        """Another normalisation, of ``NORMALIZATIONS``, of the images this one was measured on.

        Without a ``mean_image`` the kinds that subtract one subtract the mean of each channel.
        """
        if kind == "imagenet":
            return IMAGENET
        if kind == "unit":
            return self
        image = mean_image if kind in MEAN_IMAGES else None
        return Normalization(self.mean, (1.0, 1.0, 1.0), image)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; of a mean image its checksum alone."""
        values: dict[str, Any] = {"mean": list(self.mean), "std": list(self.std)}
        if self.mean_image is not None:
            about = {"centred": self.mean_image.centred, "sha256": self.mean_image.sha256}
            values["mean_image"] = about
        return values

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], mean_image: FloatPixels | None = None
    ) -> Normalization:
        """The inverse of ``to_dict``, with the pixels of the mean image, if there is one.

        Raises:
            ValueError: for anything else, and where the mean image is missing or another one.
        """
        try:
            mean, std = (tuple(map(float, values[key])) for key in ("mean", "std"))
            about = values.get("mean_image") or {}
            centred, sha256 = bool(about.get("centred")), about.get("sha256")
        except (KeyError, TypeError, ValueError, AttributeError):
            mean = std = ()
        finite = all(map(math.isfinite, mean)) and all(0 < value < math.inf for value in std)
        if len(mean) != 3 or len(std) != 3 or not finite:
            raise ValueError(f"normalization: expected mean and std, got {values!r}")
        if not about:
            return cls(mean, std)
        if mean_image is None:
            raise ValueError("normalization: its mean image is missing")
        image = MeanImage.of(mean_image, len(mean_image), centred)
        if image.sha256 != sha256:
            raise ValueError("normalization: its mean image is another one, or damaged")
        return cls(mean, std, image)


# Of the pixels of ImageNet, on the scale 0 to 255. Source: torchvision's models.
IMAGENET = Normalization(
    mean=(0.485 * 255, 0.456 * 255, 0.406 * 255), std=(0.229 * 255, 0.224 * 255, 0.225 * 255)
)
