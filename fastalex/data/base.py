"""What a set of labelled images is, and the pieces that every set shares."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

Pixels = npt.NDArray[np.uint8]

CACHE_BYTES = 1 << 30  # decoded images that one source may keep in memory


NORMALIZATIONS = {
    "unit": "zero mean and unit variance of each channel, measured on the training images",
    "mean": "the measured mean of each channel is subtracted, pixels stay 0 to 255",
    "imagenet": "torchvision's constants",
}


class DataError(ValueError):
    """The data given can't be trained on; the message is one line that says what to do."""


class ImageSource(Protocol):
    """Labelled images, decoded when they are asked for."""

    classes: list[str]  # sorted; a label is an index into it
    labels: npt.NDArray[np.int64]  # [len]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call sample ``index`` in a message: a path, or ``"synthetic train 17"``."""
        ...

    def image(self, index: int, size: int) -> Pixels:
        """uint8 [size, size, 3], RGB: the shorter side resized to ``size``, then the centre.

        What is returned may be the source's own memory: it must not be written to.
        """
        ...


@dataclass(frozen=True)
class Batch:
    """Images ready for the net, on the CPU.

    Attributes:
        images: float32 [n, 3, S, S], normalised, stored channels last (NCHW by its strides).
        labels: int64 [n].
        indices: int64 [n], which samples of the source these are.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor


@dataclass(frozen=True)
class Normalization:
    """x -> (x - mean) / std per channel, on pixels from 0 to 255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def measure(cls, source: ImageSource, size: int, sample: int = 1000) -> Normalization:
        """Mean and standard deviation of the pixels of evenly spaced images of ``source``.

        Args:
            source: the training images.
            size: side in pixels at which they are decoded.
            sample: at most this many images are looked at. Evenly spaced ones are a fair share
                of every class, because sources keep classes together or in turn.

        Returns:
            The normalisation that gives these images zero mean and unit variance in each channel;
            a channel that never varies is left at its scale.
        """
        if sample < 1:
            raise ValueError(f"sample: expected at least 1, got {sample}")
        count = min(sample, len(source))
        total, squares = np.zeros(3), np.zeros(3)
        for i in range(count):
            pixels = source.image(i * len(source) // count, size).reshape(-1, 3).astype(np.float64)
            total += pixels.mean(0)
            squares += np.square(pixels).mean(0)
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - np.square(mean), 0.0))
        std[std < 0.5] = 1.0  # half a grey level: nothing but rounding
        return cls(_triple(mean), _triple(std))

    def scaled(self, kind: str) -> Normalization:
        """Another normalisation of the images that this one was measured on.

        Args:
            kind: one of ``NORMALIZATIONS``.
        """
        if kind == "imagenet":
            return IMAGENET
        return Normalization(self.mean, (1.0, 1.0, 1.0)) if kind == "mean" else self

    def to_dict(self) -> dict[str, list[float]]:
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Normalization:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: unless both entries hold three numbers and every std is positive.
        """
        try:
            mean, std = _triple(values["mean"]), _triple(values["std"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"normalization: expected mean and std, got {values!r}") from error
        if not (all(map(math.isfinite, mean)) and all(0 < value < math.inf for value in std)):
            raise ValueError(f"normalization: expected finite mean, positive std, got {values!r}")
        return cls(mean, std)


# Of the pixels of ImageNet, on the scale 0 to 255. Source: torchvision's models.
IMAGENET = Normalization(
    mean=(0.485 * 255, 0.456 * 255, 0.406 * 255), std=(0.229 * 255, 0.224 * 255, 0.225 * 255)
)


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


class ImageCache:
    """Decoded images kept in memory, by index and size, up to a number of bytes."""

    def __init__(self, count: int, limit: int = CACHE_BYTES) -> None:
        self._count = count
        self._free = limit
        self._sizes: dict[int, tuple[Pixels, npt.NDArray[np.bool_]]] = {}
        self._lock = threading.Lock()

    def get(self, index: int, size: int) -> Pixels | None:
        pixels, filled = self._arrays(size)
        return pixels[index].copy() if index < len(filled) and filled[index] else None

    def put(self, index: int, image: Pixels) -> None:
        pixels, filled = self._arrays(len(image))
        if index < len(filled):
            pixels[index] = image
            filled[index] = True  # after the pixels: another thread may be reading

    def _arrays(self, size: int) -> tuple[Pixels, npt.NDArray[np.bool_]]:
        with self._lock:
            if size not in self._sizes:
                kept = min(self._count, self._free // (3 * size * size))
                self._free -= kept * 3 * size * size
                self._sizes[size] = (
                    np.zeros((kept, size, size, 3), np.uint8),
                    np.zeros(kept, np.bool_),
                )
            return self._sizes[size]
