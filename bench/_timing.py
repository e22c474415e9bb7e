"""Two calls timed in turn, with the host's clock on a CPU and with events on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

WARMUP = 2
_FLUSHED = 1 << 28  # bytes, several times the last-level cache of any GPU


class DeviceClock:
    """A timer whose calls alternate: the first marks the start, the next returns the seconds since.

    Both are events in the stream. Before the start a buffer is overwritten, which empties the cache
    and keeps the GPU busy while the host gets ahead, so that its launches are not part of the time.
    """

    def __init__(self) -> None:
        self._start: torch.cuda.Event | None = None

    def __repr__(self) -> str:
        return "device events"

    def reset(self) -> None:
        """Forget a start whose end never came, after a failure."""
        self._start = None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        if self._start is None:
            torch.empty(_FLUSHED, dtype=torch.uint8, device="cuda").zero_()
            event.record()
            self._start = event
            return 0.0
        event.record()
        event.synchronize()
        start, self._start = self._start, None
        return start.elapsed_time(event) / 1e3


clock: Callable[[], float] = DeviceClock() if torch.cuda.is_available() else time.perf_counter


@dataclass(frozen=True)
class Times:
    """Seconds of each round of two calls that took turns."""

    ours: list[float]
    theirs: list[float]

    def median(self) -> tuple[float, float]:
        return statistics.median(self.ours), statistics.median(self.theirs)


def take_turns(
    benchmark: Any,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int,
    clock: Callable[[], float] = clock,
) -> Times | None:
    """Time ``theirs``, ``ours``, ``theirs``, ... so that a busy spell of the machine hits both.

    pytest-benchmark times ``ours`` by its timer; its setup, which it does not time, times
    ``theirs`` by ``clock``, which is to be the same.

    Returns:
        The times, or None under --benchmark-disable.
    """
    if isinstance(clock, DeviceClock):
        clock.reset()
    for _ in range(WARMUP):
        theirs()
        ours()
    their_times: list[float] = []

    def time_theirs() -> None:
        start = clock()
        theirs()
        their_times.append(clock() - start)

    benchmark.pedantic(ours, setup=time_theirs, rounds=rounds)
    if benchmark.stats is None:
        return None
    return Times(list(benchmark.stats.stats.data), their_times)


@dataclass(frozen=True)
class Work:
    """What a call has to compute, and to move at the least: every tensor once; or its images."""

    flops: int = 0
    bytes: int = 0
    images: int = 0

    def rate(self, seconds: float) -> tuple[str, float]:
        """Unit and value: GFLOP/s of products, GB/s of what has none; images/s of what has some."""
        if self.images:
            return "images/s", self.images / seconds
        if self.flops:
            return "GFLOP/s", self.flops / seconds / 1e9
        return "GB/s", self.bytes / seconds / 1e9


@dataclass(frozen=True)
class Rates:
    """What a GPU reaches on a large product and on a large copy: a floor for every time."""

    flops: float  # a second
    bytes: float  # a second, read and written

    def floor(self, work: Work) -> float:
        """The least seconds for so much work."""
        return max(work.flops / self.flops, work.bytes / self.bytes)

    @classmethod
    def measure(cls, dtype: torch.dtype, size: int = 8192, rounds: int = 20) -> Rates:
        a = torch.randn(size, size, device="cuda", dtype=dtype)
        source = torch.zeros(1 << 30, device="cuda", dtype=torch.uint8)
        target = torch.empty_like(source)
        product = _fastest(lambda: a @ a, rounds)
        copy = _fastest(lambda: target.copy_(source), rounds)
        return cls(flops=2 * size**3 / product, bytes=2 * source.numel() / copy)


def _fastest(call: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = clock()
        call()
        times.append(clock() - start)
    return min(times)
