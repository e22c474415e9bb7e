"""The processes that pack the shards of a set, and what their parent shows meanwhile."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from typing import Any

from PIL import ImageFile
from tqdm import tqdm

from fastalex.data.base import DataError
from fastalex.data.shard import Shard, pack_shard

_LINE_SECONDS = 60.0  # between two lines of progress where there is no terminal
_BLOCK = 1 << 18  # bytes that Pillow reads or copies out at a time: all of an image of 256 pixels
# Once a piece of so many was freed, glibc keeps what is freed, up to twice that, instead of giving
# it back and faulting it in again with each image. Source: mallopt(3).
_KEPT = 16 << 20


class PackingStopped(KeyboardInterrupt):
    """Ctrl-C; the message says what is kept."""


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pack_shards(shards: list[Shard], workers: int | None, quiet: bool) -> int:
    """Make every shard in a few processes; what was done before is not done again.

    Args:
        shards: what to make.
        workers: how many work at a time; None is one for each core that this process may use.
        quiet: show no progress.

    Returns:
        How many files were decoded.

    Raises:
        DataError: where a process ended or could not go on; says what is kept.
        PackingStopped: likewise, after Ctrl-C.
    """
    total = sum(len(shard.files) for shard in shards)
    pool, done, stop = packers(workers or cores(), len(shards))
    with _Bar(total, quiet) as bar, pool:
        futures = [pool.submit(pack_in_turn, shard) for shard in shards]
        try:
            _wait(futures, lambda: bar.show(done[0], done[1]))
        except (Exception, KeyboardInterrupt) as error:
            with _ignoring_interrupts():  # an impatient second Ctrl-C
                stop.value = 1
                pool.shutdown(wait=True, cancel_futures=True)
            kept = f"{done[0] + done[1]:,} of {total:,} files are done"
            kept += ", the same command goes on from there"
            raise _explained(error, shards[0], kept) from error
        bar.show(done[0], done[1])
        return int(done[0])


def packers(workers: int, most: int) -> tuple[ProcessPoolExecutor, Any, Any]:
    """Processes for ``pack_in_turn``, at most ``most``.

    There are twice as many as work at a time: while some wait for the disk to have what is done,
    as many others are at work.

    Returns:
        The processes; the numbers of files decoded now and found done before; and what, set to 1,
        stops them.
    """
    context = multiprocessing.get_context("forkserver")
    done = context.Array("q", 2)
    stop = context.Value("b", 0, lock=False)
    turns = context.Semaphore(workers)
    context.set_forkserver_preload([__name__])
    with _ignoring_interrupts():  # which is inherited
        forkserver.ensure_running()
    count = min(2 * workers, most)
    return ProcessPoolExecutor(count, context, begin, (done, stop, turns)), done, stop


def _explained(error: BaseException, shard: Shard, kept: str) -> BaseException:
    if isinstance(error, KeyboardInterrupt):
        return PackingStopped(f"interrupted; {kept}")
    if isinstance(error, BrokenProcessPool):
        return DataError(f"a process was killed, perhaps for want of memory; {kept}")
    if isinstance(error, OSError):
        return DataError(f"{shard.root}: {(error.strerror or str(error)).lower()}; {kept}")
    return error


def _wait(futures: list[Future[None]], show: Callable[[], None]) -> None:
    waiting = set(futures)
    while waiting:
        finished, waiting = wait(waiting, 0.2, FIRST_EXCEPTION)
        for future in finished:
            future.result()
        show()


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


# In a process that packs. `begin` sets what `pack_in_turn` uses.

_advance: Callable[[int, int], bool]
_turns: contextlib.AbstractContextManager[object]


def begin(done: Any, stop: Any, turns: Any) -> None:
    """Be quiet, deaf to Ctrl-C, and gone with the parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and says stop
    warnings.simplefilter("ignore")  # Pillow's, on metadata, without the file's name
    threading.Thread(target=_die_with_parent, daemon=True).start()
    ImageFile.MAXBLOCK = _BLOCK
    bytearray(_KEPT)

    counts = done.get_obj()  # each use of ``done`` itself takes the lock once more

    def advance(decoded: int, kept: int) -> bool:
        with done.get_lock():
            counts[0] += decoded
            counts[1] += kept
        return not stop.value

    global _advance, _turns
    _advance, _turns = advance, turns


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def pack_in_turn(shard: Shard) -> None:
    pack_shard(shard, _advance, _turns)


class _Bar:
    """How far the work is: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self, total: int, quiet: bool) -> None:
        tqdm.set_lock(threading.RLock())  # its own is the system's, and a killed process leaves it
        self._bar = tqdm(
            desc="Packing", total=total, unit=" images", dynamic_ncols=True, disable=quiet or None
        )
        self._spoke = self._started = time.monotonic()
        self._total, self._lines = total, self._bar.disable and not quiet

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def show(self, decoded: int, kept: int) -> None:
        """Show what is done: decoded now, which is what the rate counts, and found done before."""
        self._bar.initial = kept
        self._bar.update(decoded + kept - self._bar.n)
        now = time.monotonic()
        if self._lines and now - self._spoke > _LINE_SECONDS:
            self._spoke = now
            rate = decoded / (now - self._started)
            line = f"{decoded + kept:,} of {self._total:,} images, {rate:,.0f} images/s"
            print(line, file=sys.stderr, flush=True)
