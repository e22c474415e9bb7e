"""The shards of a packed set, each made by one process.

A shard is done once its record is there, which is written last. One that was under way when
packing ended, however it ended, is made anew.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ImageFile
from tqdm import tqdm

from fastalex.common.files import replacing
from fastalex.data.base import DataError
from fastalex.data.decode import read_whole, try_read
from fastalex.data.normalization import Moments
from fastalex.data.packed import HEADER, WORK, crc32, shard_header, shard_path

_BLOCK = 1 << 18  # bytes that Pillow reads or copies out at a time: all of an image of 256 pixels
# Once a piece of so many was freed, glibc keeps what is freed, up to twice that, instead of giving
# it back and faulting it in again with each image. Source: mallopt(3).
_KEPT = 16 << 20


class PackingStopped(KeyboardInterrupt):
    """Ctrl-C; the message says what is kept."""


class Record(NamedTuple):
    """What became of one file below the source folder: left out if it has no CRC-32 of pixels."""

    file: str
    checksum: int | None
    remark: str | None  # why it was left out, or what is odd about it


class Shard(NamedTuple):
    """What goes into shard ``number`` of a part: files below ``source``, at ``size`` pixels."""

    source: Path
    root: Path  # of the packed set
    part: str
    number: int
    files: list[str]
    size: int

    @property
    def path(self) -> Path:
        return shard_path(self.root, self.part, self.number)

    @property
    def record(self) -> Path:
        return self.root / WORK / f"{self.part}-{self.number:05d}.npz"

    def is_done(self) -> bool:
        return self.record.exists() and self.path.exists()

    def recorded(self) -> tuple[list[Record], Moments]:
        """What became of its files, and the sums of its pixels."""
        moments = Moments(self.size)
        with np.load(self.record) as saved:
            records = [Record(*values) for values in json.loads(saved["records"].tobytes())]
            moments.images = sum(record.checksum is not None for record in records)
            moments.pixels, moments.products = saved["pixels"], saved["products"]
        return records, moments


def pack_shards(shards: list[Shard], workers: int | None) -> int:
    """Make every shard that is not done, and return how many files were decoded.

    Raises:
        DataError: where one of the ``workers``, processes, ended or could not go on; says what is
            kept.
        PackingStopped: likewise, after Ctrl-C.
    """
    missing = [shard for shard in shards if not shard.is_done()]
    total, wanted = (sum(len(shard.files) for shard in some) for some in (shards, missing))
    decoded = 0
    tqdm.set_lock(threading.RLock())  # its own is the system's, and a killed process leaves it
    bar = tqdm(desc="Packing", total=total, initial=total - wanted, unit=" images", disable=None)
    try:
        with bar, packing_pool(min(workers or cores(), len(missing))) as pool:
            for future in as_completed([pool.submit(decode_shard, shard) for shard in missing]):
                decoded += future.result()
                bar.update(future.result())
    except (BrokenProcessPool, OSError, EOFError, KeyboardInterrupt) as error:
        kept = f"{total - wanted + decoded:,} of {total:,} files are done"
        kept += ", the same command goes on from there"
        if isinstance(error, KeyboardInterrupt):
            raise PackingStopped(f"interrupted; {kept}") from error
        if isinstance(error, BrokenProcessPool | ConnectionError | EOFError):
            raise DataError(f"a process was killed, perhaps for want of memory; {kept}") from error
        why = (error.strerror or str(error)).lower()
        raise DataError(f"{shards[0].root}: {why}; {kept}") from error
    return decoded


@contextlib.contextmanager
def packing_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for ``decode_shard``; an exception in the block stops them within an image."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    stop = context.Event()
    with _ignoring_interrupts():  # which is inherited
        forkserver.ensure_running()
    pool = ProcessPoolExecutor(max(workers, 1), context, _begin, (stop,))
    try:
        yield pool
    except BaseException:
        with _ignoring_interrupts():  # an impatient second Ctrl-C
            stop.set()
            pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


# In a process that packs

_stop: Event  # set by ``_begin``


def _begin(stop: Event) -> None:
    """Be quiet, deaf to Ctrl-C, and gone with the parent, however that ends."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and says stop
    warnings.simplefilter("ignore")  # Pillow's, on metadata, without the file's name
    threading.Thread(target=_die_with_parent, daemon=True).start()
    ImageFile.MAXBLOCK = _BLOCK
    bytearray(_KEPT)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def decode_shard(shard: Shard) -> int:
    """Decode the files of a shard, write it and, last, its record; returns how many files.

    Raises:
        OSError: where it can't be written.
    """
    records: list[Record] = []
    moments = Moments(shard.size)
    with replacing(shard.path) as temporary, open(temporary, "wb") as pixels:
        pixels.seek(HEADER)
        for file in shard.files:
            if _stop.is_set():
                raise InterruptedError  # nobody waits for the result
            result = try_read(read_whole, shard.source / file, shard.size)
            if isinstance(result, str):
                records.append(Record(file, None, result))
            else:
                image, remark = result
                pixels.write(image.data)
                moments.add(image)
                records.append(Record(file, crc32(image.data), remark))
        pixels.seek(0)
        pixels.write(shard_header(moments.images, shard.size))
    text = np.frombuffer(json.dumps(records).encode(), np.uint8)
    with replacing(shard.record) as temporary, open(temporary, "wb") as file_of_record:
        np.savez(file_of_record, records=text, pixels=moments.pixels, products=moments.products)
    return len(records)
