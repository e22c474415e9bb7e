"""What a set of labelled images is, and the pieces that every set shares."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from fastalex.data.fingerprint import Contents

if TYPE_CHECKING:
    import torch

Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")

CACHE_BYTES = 1 << 30  # decoded images that one source may keep in memory
MAX_IMAGE_SIZE = 2048  # largest side in pixels of the images that a net gets


_PAUSES = (0.1, 1.0, 5.0)  # seconds
_MAY_PASS = frozenset(
    {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ENOMEM, errno.EMFILE, errno.ENFILE}
    | {errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.ENETDOWN, errno.ENETUNREACH}
    | {errno.EHOSTDOWN, errno.EHOSTUNREACH}
)


class DataError(ValueError):
    """The data given can't be trained on; the message is one line that says what to do."""


def printable(name: str) -> str:
    """A name of a file without the characters that end or rewrite a line, which it may hold."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def retrying(read: Callable[[], T]) -> T:
    """``read()``, called again after pauses while a disk or a network fails that may come back."""
    for pause in _PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno not in _MAY_PASS:
                raise
        time.sleep(pause)
    return read()


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

    def whole(self, index: int, size: int) -> Image.Image:
        """All there is of the image, RGB, for parts of it to be cut out.

        ``size`` is the side for an image that has no size of its own.
        """
        ...

    def contents(self) -> Contents:
        """Of each class, in order, how many images it has and a digest of them.

        No image is decoded: files are told apart by name and size, those of a packed set by name
        and checksum. ``fastalex.data.fingerprint.describe_changes`` compares two.
        """
        ...

    def fingerprint(self) -> str:
        """SHA-256 of ``contents``, hexadecimal: equal where each index names the same image."""
        ...


@dataclass(frozen=True)
class Batch:
    """Images as bytes and what augmentation is to do to them, drawn on the CPU.

    Attributes:
        images: uint8 [n, D, D, 3], RGB; page-locked where there is a GPU.
        labels: int64 [n].
        indices: int64 [n], which samples of the source these are; always on the CPU.
        tops, lefts: int32 [n], the first row and column of each crop.
        mirrors: bool [n], which crops are mirrored left to right.
        colors: float32 [n, 3], what is added to the pixels of each image, 0 to 255; or None.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    tops: torch.Tensor
    lefts: torch.Tensor
    mirrors: torch.Tensor
    colors: torch.Tensor | None = None

    @property
    def pixels(self) -> tuple[torch.Tensor, ...]:
        """What ``fastalex.data.augment.Augment`` is called with."""
        drawn = (self.images, self.tops, self.lefts, self.mirrors)
        return drawn if self.colors is None else (*drawn, self.colors)

    def empty(self, device: torch.device) -> Batch:
        """Memory on ``device`` for a batch of this one's shapes."""
        import torch

        return replace(self, **{n: torch.empty_like(x, device=device) for n, x in self._moved()})

    def copy_to(self, place: Batch) -> Batch:
        """This batch, copied into the memory of ``place``.

        The host does not wait for the copy of page-locked memory.
        """
        for name, x in self._moved():
            getattr(place, name).copy_(x, non_blocking=True)
        return replace(place, indices=self.indices)

    def _moved(self) -> list[tuple[str, torch.Tensor]]:
        return [(n, x) for n, x in vars(self).items() if x is not None and n != "indices"]


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
