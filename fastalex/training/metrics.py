"""Where the time of a run goes, and its mean loss."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence

from fastalex.common.timing import Stopwatch


class Meter:
    """Mean loss of the last ``window`` steps, and images/s and seconds since the last record.

    Args:
        window: steps whose losses count.
        exchange: of the processes; its time is part of a record.
        losses: of an earlier part of the run.
    """

    def __init__(
        self, window: int, exchange: Stopwatch | None = None, losses: Sequence[float] = ()
    ) -> None:
        self._losses: deque[float] = deque(losses, maxlen=window)
        self._exchange = exchange or Stopwatch()
        self._waited = 0.0
        self._images = 0
        self._since = time.monotonic()
        self._last_rate: float | None = None

    def start(self) -> None:
        """Forget the time since the last record, which was not training's."""
        self._exchange.read()
        self._images, self._waited, self._since = 0, 0.0, time.monotonic()

    def add(self, loss: float, images: int) -> None:
        self._losses.append(loss)
        self._images += images

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as spent on waiting for data."""
        since = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - since

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of records: it is not training's."""
        since = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - since

    @property
    def losses(self) -> list[float]:
        """Of the last steps, for another meter to go on with."""
        return list(self._losses)

    @property
    def loss(self) -> float | None:
        return math.fsum(self._losses) / len(self._losses) if self._losses else None

    @property
    def rate(self) -> float | None:
        """As of the last record, which is steadier than since then."""
        return self._last_rate or self._rate()

    def record(self) -> dict[str, float | None]:
        """Loss, images/s and seconds for a record; the time of the next one begins.

        ``data_seconds`` were spent on waiting for data, ``exchange_seconds`` on exchange between
        processes (the wait for the other one included), ``compute_seconds`` on the rest.
        """
        self._last_rate = self._rate()
        seconds, exchange = time.monotonic() - self._since, self._exchange.read()
        record = {
            "loss": self.loss,
            "images_per_s": self._last_rate,
            "seconds": seconds,
            "data_seconds": self._waited,
            "exchange_seconds": exchange,
            "compute_seconds": max(0.0, seconds - self._waited - exchange),
        }
        self.start()
        return record

    def _rate(self) -> float | None:
        return self._images / (time.monotonic() - self._since) if self._images else None
