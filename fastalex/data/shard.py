"""One shard of a packed set, made by one process that may be killed at any moment.

Images are decoded in order and appended to a file of pixels; after each, a line goes to the journal
beside it. What the journal names is packed: another process reads it, checks the pixels against
their checksums and goes on behind them. A shard is done when its sums are there, written last.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from fastalex.data.base import Pixels
from fastalex.data.decode import read_whole, try_read
from fastalex.data.packed import HEADER, WORK, shard_header, shard_path
from fastalex.files import replacing

MAX_SIZE = 1024


class Record(NamedTuple):
    """A line of the journal.

    Attributes:
        file: path below the source folder.
        checksum: CRC-32 of the pixels; None where the file was left out.
        remark: why it was left out, or what is odd about it.
    """

    file: str
    checksum: int | None
    remark: str | None


@dataclass(frozen=True)
class Shard:
    """What goes into one shard.

    Attributes:
        source: the folder that the paths in ``files`` are below.
        root: the packed set.
        part: "train" or "val".
        number: of the shard in its part.
        files: every image file of the shard, readable or not.
        size: side in pixels of the packed images.
    """

    source: Path
    root: Path
    part: str
    number: int
    files: list[str]
    size: int

    @property
    def path(self) -> Path:
        return shard_path(self.root, self.part, self.number)

    def work(self, suffix: str) -> Path:
        return self.root / WORK / f"{self.part}-{self.number:05d}.{suffix}"

    def is_done(self) -> bool:
        return self.work("sums.npz").exists() and self.path.exists()

    def records(self) -> list[Record]:
        """What the journal of a shard that is done says."""
        return _whole_lines(self.work("journal").read_bytes())[0]

    def sums(self) -> Sums:
        with np.load(self.work("sums.npz")) as saved:
            return Sums(int(saved["images"]), saved["pixels"], saved["products"])


@dataclass
class Sums:
    """Exact sums over images: the same in whatever order they are added.

    Attributes:
        images: how many.
        pixels: float64 [size, size, 3], the sum of each pixel.
        products: float64 [3, 3], the sum over all pixels of the products of two channels.
    """

    images: int
    pixels: npt.NDArray[np.float64]
    products: npt.NDArray[np.float64]

    @classmethod
    def zero(cls, size: int) -> Sums:
        return cls(0, np.zeros((size, size, 3)), np.zeros((3, 3)))

    def merge(self, other: Sums) -> None:
        self.images += other.images
        self.pixels += other.pixels
        self.products += other.products

    def mean_image(self) -> npt.NDArray[np.float64]:
        """[size, size, 3], 0 to 255."""
        return self.pixels / self.images

    def moments(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Mean [3] and covariance [3, 3] of the channels of all pixels."""
        count = self.images * self.pixels[..., 0].size
        mean = self.pixels.sum((0, 1)) / count
        return mean, self.products / count - np.outer(mean, mean)


class _Adder:
    """Adds images to sums, in numbers that are just wide enough to stay exact.

    A line of an image holds r g b r g b ..., so that its product with itself, moved by 0, 1 or 2
    places, holds every product of two channels of a pixel. Added up line by line in float32, no
    channel has to be taken out of the line first. A few lines at a time stay in the cache.
    """

    _IMAGES = 257  # whose pixels 16 bits can add up
    _LINES = 128  # of at most 258, whose products stay below 2^24, where float32 is exact

    def __init__(self, size: int) -> None:
        self._images = 0
        self._few = np.zeros((size, size * 3), np.uint16)
        self._pixels = np.zeros((size, size * 3), np.uint32)
        shape = (min(size, self._LINES), size * 3)
        moved = np.zeros(math.prod(shape) + 2, np.float32)
        self._lines = moved[:-2].reshape(shape)
        self._moved = as_strided(moved, (3, *shape), (moved.itemsize, *self._lines.strides))
        self._totals = np.zeros((3, size * 3))  # of products, by shift and place in the line

    def add(self, image: Pixels) -> None:
        self._images += 1
        image = image.reshape(self._few.shape)
        for first in range(0, len(image), len(self._lines)):
            block = slice(first, first + len(self._lines))
            np.add(self._few[block], image[block], out=self._few[block])
            lines = self._lines[: len(image) - first]
            np.copyto(lines, image[block])
            self._totals += np.einsum("yk,syk->sk", lines, self._moved[:, : len(lines)])
        if self._images % self._IMAGES == 0:
            self._spill()

    def _spill(self) -> None:
        self._pixels += self._few
        self._few[:] = 0

    def save(self, path: Path) -> None:
        self._spill()
        products = np.zeros((3, 3))
        for shift in range(3):
            for channel in range(3 - shift):
                total = self._totals[shift, channel::3].sum()
                products[channel, channel + shift] = products[channel + shift, channel] = total
        with replacing(path) as temporary, open(temporary, "wb") as file:
            pixels = self._pixels.reshape(len(self._pixels), -1, 3)
            np.savez(file, images=self._images, pixels=pixels, products=products)


def pack_shard(shard: Shard, advance: Callable[[int, int], bool]) -> None:
    """Make one shard, or go on with one that was begun.

    Args:
        shard: what goes into it.
        advance: called with the numbers of files that were decoded now and found done before;
            where it returns False, the work stops here and can be gone on with.

    Raises:
        OSError: where something can't be written.
    """
    with _opened(shard.work("journal")) as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)  # a process of a packing just killed may be here still
        if shard.is_done():
            advance(0, len(shard.files))
            return
        if shard.path.exists() and not shard.work("pixels").exists():  # killed before the sums
            os.replace(shard.path, shard.work("pixels"))
        sums = _Adder(shard.size)
        with _opened(shard.work("pixels")) as pixels:
            records = _resume(shard, pixels, journal, sums)
            if not advance(0, len(records)):
                return
            for file in shard.files[len(records) :]:
                records.append(_pack_file(shard, file, pixels, sums))
                journal.write(json.dumps(records[-1]).encode() + b"\n")
                journal.flush()
                if not advance(1, 0):
                    return
            count = sum(record.checksum is not None for record in records)
            pixels.seek(0)
            pixels.write(shard_header(count, shard.size))
            for written in (pixels, journal):
                written.flush()
                os.fsync(written.fileno())
        os.replace(shard.work("pixels"), shard.path)
        sums.save(shard.work("sums.npz"))


def _pack_file(shard: Shard, file: str, pixels: BinaryIO, sums: _Adder) -> Record:
    result = try_read(read_whole, shard.source / file, shard.size)
    if isinstance(result, str):
        return Record(file, None, result)
    image, remark = result
    pixels.write(image.data)
    pixels.flush()
    sums.add(image)
    return Record(file, zlib.crc32(image.data), remark)


def _resume(shard: Shard, pixels: BinaryIO, journal: BinaryIO, sums: _Adder) -> list[Record]:
    """The records whose pixels are there and right; both files are cut behind them."""
    records, ends = _whole_lines(journal.read())
    image = np.empty((shard.size, shard.size, 3), np.uint8)
    pixels.seek(HEADER)
    kept = images = 0
    for record in records:
        if record.checksum is not None:
            # A machine that lost power may have kept the line and not the pixels.
            whole = pixels.readinto(image.data) == image.nbytes  # type: ignore[attr-defined]
            if not whole or zlib.crc32(image.data) != record.checksum:
                break
            sums.add(image)
            images += 1
        kept += 1
    for file, end in ((journal, ends[kept]), (pixels, HEADER + images * image.nbytes)):
        file.seek(end)
        file.truncate()
    return records[:kept]


def _whole_lines(text: bytes) -> tuple[list[Record], list[int]]:
    """The records up to the first that is cut off, and where each begins, and the last ends."""
    records: list[Record] = []
    ends = [0]
    for line in text.splitlines(keepends=True):
        try:
            if not line.endswith(b"\n"):
                break
            records.append(Record(*json.loads(line)))
        except (ValueError, TypeError):
            break
        ends.append(ends[-1] + len(line))
    return records, ends


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file to read and write, made if it is not there."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with open(descriptor, "r+b") as file:
        yield file
