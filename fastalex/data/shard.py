"""One shard of a packed set, made by one process that may be killed at any moment.

Images are decoded in order and appended to a file of pixels; after each, a line goes to the journal
beside it. What the journal names is packed: another process reads it, checks the pixels against
their checksums and goes on behind them. A shard is done when its sums are there, written last.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from fastalex.data.checksum import crc32
from fastalex.data.decode import read_whole, try_read
from fastalex.data.packed import HEADER, WORK, shard_header, shard_path
from fastalex.data.sums import Sums


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
        return Sums.load(self.work("sums.npz"))


def pack_shard(
    shard: Shard,
    advance: Callable[[int, int], bool],
    turn: contextlib.AbstractContextManager[object] | None = None,
) -> None:
    """Make one shard, or go on with one that was begun.

    Args:
        shard: what goes into it.
        advance: called with the numbers of files that were decoded now and found done before;
            where it returns False, the work stops here and can be gone on with.
        turn: held while there is something to calculate, and not while the disk is waited for.

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
        with _opened(shard.work("pixels")) as pixels:
            with turn or contextlib.nullcontext():
                sums = _fill(shard, pixels, journal, advance)
            if sums is None:
                return
            for written in (pixels, journal):
                os.fsync(written.fileno())
        os.replace(shard.work("pixels"), shard.path)
        sums.save(shard.work("sums.npz"))


def _fill(
    shard: Shard, pixels: BinaryIO, journal: BinaryIO, advance: Callable[[int, int], bool]
) -> Sums | None:
    """Write both files to their ends; None where ``advance`` said to stop before."""
    records = _resume(shard, pixels, journal)
    if not advance(0, len(records)):
        return None
    for file in shard.files[len(records) :]:
        records.append(_pack_file(shard, file, pixels))
        journal.write(json.dumps(records[-1]).encode() + b"\n")
        journal.flush()
        if not advance(1, 0):
            return None
    count = sum(record.checksum is not None for record in records)
    pixels.seek(0)
    pixels.write(shard_header(count, shard.size))
    pixels.flush()
    sums = Sums.zero(shard.size)
    if count:  # read from the file, all at once: decoding has the cache for itself until then
        shape = (count, shard.size, shard.size, 3)
        sums.add(np.memmap(shard.work("pixels"), np.uint8, "r", HEADER, shape))
    return sums


def _pack_file(shard: Shard, file: str, pixels: BinaryIO) -> Record:
    result = try_read(read_whole, shard.source / file, shard.size)
    if isinstance(result, str):
        return Record(file, None, result)
    image, remark = result
    pixels.write(image.data)
    pixels.flush()
    return Record(file, crc32(image.data), remark)


def _resume(shard: Shard, pixels: BinaryIO, journal: BinaryIO) -> list[Record]:
    """The records whose pixels are there and right; both files are cut behind them."""
    records, ends = _whole_lines(journal.read())
    image = np.empty((shard.size, shard.size, 3), np.uint8)
    pixels.seek(HEADER)
    kept = images = 0
    for record in records:
        if record.checksum is not None:
            # A machine that lost power may have kept the line and not the pixels.
            whole = pixels.readinto(image.data) == image.nbytes  # type: ignore[attr-defined]
            if not whole or crc32(image.data) != record.checksum:
                break
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
