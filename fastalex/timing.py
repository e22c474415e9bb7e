"""Calls timed in turn, with the host's clock on a CPU and with events on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

Clock = Callable[[], float]  # seconds; two calls enclose what is timed

WARMUP = 2
_FLUSHED = 1 << 28  # bytes, several times the last-level cache of any GPU
_LEAD = 8  # times it is overwritten: longer than the host needs for the launches of a layer


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
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        if self._start is None:
            buffer = torch.empty(_FLUSHED, dtype=torch.uint8, device="cuda")
            for _ in range(_LEAD):
                buffer.zero_()
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
    for call in calls.values():
        for _ in range(WARMUP):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return seconds
