"""Calls timed in turn, with the host's clock on a CPU and with events on a GPU."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping

import torch

Clock = Callable[[], float]  # seconds; two calls enclose what is timed

WARMUP = 2
_FLUSHED = 1 << 28  # bytes, several times the last-level cache of any GPU
_LEAD = 8  # times it is overwritten, at least


class DeviceClock:
    """A timer whose calls alternate: the first marks the start, the next returns the seconds since.

    Both are events in the stream. Before the start a buffer is overwritten, which empties the cache
    and keeps the GPU busy while the host gets ahead, so that its launches are not part of the time:
    see ``lead``.
    """

    def __init__(self) -> None:
        self._start: torch.cuda.Event | None = None
        self._lead = _LEAD

    def __repr__(self) -> str:
        return "device events"

    def reset(self) -> None:
        """Forget a start whose end never came, after a failure."""
        self._start = None

    def lead(self, host: float) -> None:
        """From now on keep the GPU busy for longer than ``host`` seconds before the start."""
        self._lead = _LEAD
        self()
        self._overwrite()
        self._lead = overwrites(host, self() / _LEAD)

    def _overwrite(self) -> None:
        buffer = torch.empty(_FLUSHED, dtype=torch.uint8, device="cuda")
        for _ in range(self._lead):
            buffer.zero_()

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        if self._start is None:
            self._overwrite()
            event.record()
            self._start = event
            return 0.0
        event.record()
        event.synchronize()
        start, self._start = self._start, None
        return float(start.elapsed_time(event)) / 1e3


def clock_of(device: torch.device) -> Clock:
    """The clock that times what runs on ``device``."""
    return DeviceClock() if device.type == "cuda" else time.perf_counter


def overwrites(host: float, each: float) -> int:
    """How often a buffer is overwritten, in ``each`` seconds, to last twice as long as the host."""
    return max(_LEAD, math.ceil(2 * host / each))


def warm_up(calls: Mapping[str, Callable[[], object]], clock: Clock) -> dict[str, float]:
    """Run each call ``WARMUP`` times, and let the clock know how long the host needs for one.

    Returns:
        On a GPU the seconds until each call returns, with the GPU idle before, by name.
    """
    for call in calls.values():
        for _ in range(WARMUP):
            call()
    if not isinstance(clock, DeviceClock):
        return {}
    host = {name: _host_seconds(call) for name, call in calls.items()}
    clock.reset()
    clock.lead(max(host.values()))
    return host


def _host_seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def take_turns(
    calls: Mapping[str, Callable[[], object]], clock: Clock, rounds: int
) -> dict[str, list[float]]:
    """Time calls one after the other, again and again, so that a busy spell hits all of them.

    Args:
        calls: by name; each has run ``WARMUP`` times before the first is timed.
        clock: as ``clock_of`` gives it.
        rounds: times that each is timed.

    Returns:
        The seconds of every round, by name.
    """
    warm_up(calls, clock)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return seconds


class Stopwatch:
    """Seconds spent inside its ``with`` blocks: by the clock, on a GPU by its stream's events.

    What is captured in a CUDA graph is not counted.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event, int]] = []

    @contextlib.contextmanager
    def running(self, device: torch.device, times: int = 1) -> Iterator[None]:
        """Count the time of the block, for work on ``device``, so many times; 0 costs nothing."""
        if device.type != "cuda":
            since = time.monotonic()
            try:
                yield
            finally:
                self._seconds += times * (time.monotonic() - since)
            return
        if times == 0 or torch.cuda.is_current_stream_capturing():
            yield
            return
        events = _event(), _event()
        events[0].record()
        try:
            yield
        finally:
            events[1].record()
            self._events.append((*events, times))

    def read(self) -> float:
        """The seconds since the last reading; on a GPU, waits for the last block."""
        seconds = self._seconds
        for start, end, times in self._events:
            end.synchronize()
            seconds += times * start.elapsed_time(end) / 1000
        self._seconds = 0.0
        self._events.clear()
        return seconds


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
