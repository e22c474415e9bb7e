"""The numbers of a run: what a record holds, metrics.jsonl, and TensorBoard."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from fastalex.common.timing import Stopwatch

_LOCK_SECONDS = 10.0  # within which the processes of a killed launcher have ended
STUCK_STEPS = 100
_SYNC_SECONDS = 1.0  # records of steps reach the disk this soon, those of epochs at once


class RunningMetrics:
    """Mean loss of the last ``window`` steps, and images/s and seconds since the last record.

    Args:
        window: steps whose losses count.
        exchange: of the processes; its time is part of a record.
        losses: of an earlier part of the run.
    """

    def __init__(
        self, window: int, exchange: Stopwatch | None = None, losses: Sequence[float] = ()
    ) -> None:
        self.losses = deque(losses, maxlen=max(window, STUCK_STEPS))  # of the last steps
        self.rate: float | None = None  # images/s as of the last record
        self._window, self._exchange = window, exchange or Stopwatch()
        self._waiting = Stopwatch()
        self.start()

    def start(self) -> None:
        """Forget the time since the last record, which was not training's."""
        self._exchange.read()
        self._waiting.read()
        self._images, self._since = 0, time.monotonic()

    def add(self, loss: float, images: int) -> None:
        self.losses.append(loss)
        self._images += images

    def waiting(self) -> AbstractContextManager[None]:
        """Count the time of the block as spent on waiting for data."""
        return self._waiting.running(torch.device("cpu"))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of records: it is not training's."""
        since = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - since

    @property
    def loss(self) -> float | None:
        losses = list(self.losses)[-self._window :]
        return math.fsum(losses) / len(losses) if losses else None

    def record(self) -> dict[str, float | None]:
        """Loss, images/s and seconds for a record; the time of the next one begins.

        ``data_seconds`` were spent on waiting for data, ``exchange_seconds`` on exchange between
        processes (the wait for the other one included), ``compute_seconds`` on the rest.
        """
        seconds = time.monotonic() - self._since
        self.rate = self._images / seconds if self._images else None
        exchange, waited = self._exchange.read(), self._waiting.read()
        self.start()
        return {
            "loss": self.loss,
            "images_per_s": self.rate,
            "seconds": seconds,
            "data_seconds": waited,
            "exchange_seconds": exchange,
            "compute_seconds": max(0.0, seconds - waited - exchange),
        }


def is_stuck(losses: Sequence[float], classes: int) -> bool:
    """Whether a loss stays at ln(classes), where every class is as likely as any other.

    Over the last STUCK_STEPS steps the mean loss lies within 2% of ln(classes), and from their
    first half to their second it did not fall by more than 0.3%: a run on its way down is spared.
    With fewer steps, or one class, nothing is stuck.
    """
    level, half = math.log(classes), STUCK_STEPS // 2
    if len(losses) < STUCK_STEPS or level == 0:
        return False
    first, second = (
        statistics.fmean(part) for part in (losses[-STUCK_STEPS:-half], losses[-half:])
    )
    return abs((first + second) / 2 - level) <= 0.02 * level and first - second <= 0.003 * level


class MetricsLog:
    """Appends records to metrics.jsonl, one JSON object a line.

    A line reaches the system in one write, so that a killed process leaves whole lines, and the
    disk within about a second, so that a machine that loses power leaves nearly all of them.

    ``length`` bytes of an older file stay, the rest is cut off; None is all.
    """

    def __init__(self, path: Path, length: int | None = None) -> None:
        self._path = path
        self._file = open_locked(path, alone=False)
        found = self.length
        self.missing = max(0, (length or 0) - found)  # bytes that an older file should have had
        if length is not None and length < found:
            os.ftruncate(self._file, length)
        self._synced = time.monotonic()

    @property
    def length(self) -> int:
        return os.fstat(self._file).st_size

    def append(self, record: dict[str, Any], sync: bool = False) -> None:
        """Add a record; ``sync`` waits until it is on the disk.

        Raises:
            OSError: where it can't be written whole; no part of it stays.
        """
        line, before = (json.dumps(record) + "\n").encode(), self.length
        try:
            while line:
                line = line[os.write(self._file, line) :]
            if sync or time.monotonic() - self._synced > _SYNC_SECONDS:
                self.sync()
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, before)
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)


def open_locked(path: Path, alone: bool) -> int:
    """The file, open to append; as long as it is open, no other process can claim its folder.

    ``alone``: whether no other process may have it open already. Afterwards both kinds share it.

    Raises:
        OSError: where another process has it, or it can't be opened.
    """
    last = time.monotonic() + _LOCK_SECONDS
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if alone:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), path.stat()):  # else its owner took it away
                return file
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                return file  # this file system has no locks
            os.close(file)
            raise
        os.close(file)
        if time.monotonic() > last:
            raise OSError(errno.EBUSY, "another process trains in this folder", str(path))
        time.sleep(0.1)


class TensorBoard:
    """Writes the records of a run for TensorBoard; those of an earlier part end with ``step``."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow, and its package is optional

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)  # type: ignore[no-untyped-call]
        self.close = self._writer.close

    def add(self, record: Mapping[str, Any]) -> None:
        """Add the numbers of a record of metrics.jsonl."""
        part = {"step": "train", "epoch": "validation"}[record["kind"]]
        for name, value in record.items():
            if isinstance(value, float):
                self._writer.add_scalar(f"{part}/{name}", value, record["step"])
