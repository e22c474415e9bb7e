"""What a set of labelled images is, and the pieces that every set shares."""

from __future__ import annotations

import errno
import functools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")
R = TypeVar("R")

CACHE_BYTES = 1 << 30  # of decoded images, kept in memory by one dataset
MAX_IMAGE_SIZE = 2048  # largest side in pixels of the images that a net gets
_PAUSES = (0.1, 1.0, 5.0)  # seconds
_MAY_PASS = frozenset(
    {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ENOMEM, errno.EMFILE, errno.ENFILE}
    | {errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.ENETDOWN, errno.ENETUNREACH}
    | {errno.EHOSTDOWN, errno.EHOSTUNREACH}
)


def decode_size(image_size: int) -> int:
    """Side at which images are decoded for a net of ``image_size``: 256 for 224 (P§2, P§4.1)."""
    return round(image_size * 256 / 224)


class DataError(ValueError):
    """The data given can't be trained on; the message is one line that says what to do."""


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


class ImageDataset(Protocol):
    """Labelled images, decoded when they are asked for."""

    classes: list[str]  # sorted; a label is an index into it
    labels: npt.NDArray[np.int64]  # [len]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call sample ``index`` in a message: a path, or ``"synthetic train 17"``."""
        ...

    def image(self, index: int, size: int) -> Pixels:
        """uint8 [size, size, 3], RGB: the shorter side resized to ``size``, then the centre.

        What is returned may be the dataset's own memory: it must not be written to.
        """
        ...

    def whole(self, index: int, size: int) -> Image.Image:
        """All of the image, RGB; ``size`` is the side of one that has no size of its own."""
        ...

    def keys(self) -> Iterable[tuple[Any, ...]]:
        """Of each image what tells it from others without decoding it, as JSON can hold it."""
        ...


class ImageCache:
    """Decoded images kept in memory, by a key and their size, up to a number of bytes."""

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self._free = limit
        self._images: dict[tuple[Hashable, int], Pixels] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, size: int) -> Pixels | None:
        return self._images.get((key, size))

    def put(self, key: Hashable, image: Pixels) -> None:
        with self._lock:
            if (key, len(image)) not in self._images and image.nbytes <= self._free:
                self._free -= image.nbytes
                self._images[key, len(image)] = image


def map_ahead(
    function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int
) -> Generator[R, None, None]:
    """``map(function, items)``, in order, by ``workers`` threads and up to ``ahead`` items early.

    An exception of ``function`` is raised here, at its item's turn. However the iteration ends (at
    the last item, by an exception, by Ctrl-C, or dropped half-way), work not begun is cancelled
    and the threads have ended when this returns. With 0 workers ``function`` is called here.
    """
    if workers == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, "fastalex-data", _same_gpu())
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _same_gpu() -> Callable[[], None] | None:
    """What has another thread use the GPU of this one, if this process uses any."""
    torch: Any = sys.modules.get("torch")  # packing does without it
    if torch is None or not torch.cuda.is_initialized():
        return None
    return functools.partial(torch.cuda.set_device, torch.cuda.current_device())
