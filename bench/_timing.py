"""Two calls timed in turn by pytest-benchmark, and what their times are held against."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastalex.common.timing import Clock, clock_of, warm_up
from fastalex.inspection.cost import Floor

clock: Clock = clock_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


class Times(NamedTuple):
    """Seconds of each round of two calls that took turns; on a GPU those of the host, too."""

    ours: list[float]
    theirs: list[float]
    host: dict[str, float]

    def median(self) -> tuple[float, float]:
        return statistics.median(self.ours), statistics.median(self.theirs)


def take_turns(
    benchmark: Any,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int,
    clock: Clock = clock,
) -> Times | None:
    """Time ``theirs``, ``ours``, ``theirs``, ... so that a busy spell of the machine hits both.

    pytest-benchmark times ``ours`` by its timer; its setup, which it does not time, times
    ``theirs`` by ``clock``, which is to be the same.

    Returns:
        The times, or None under --benchmark-disable.
    """
    host = warm_up({"ours": ours, "theirs": theirs}, clock)
    their_times: list[float] = []

    def time_theirs() -> None:
        start = clock()
        theirs()
        their_times.append(clock() - start)

    benchmark.pedantic(ours, setup=time_theirs, rounds=rounds)
    if benchmark.stats is None:
        return None
    return Times(list(benchmark.stats.stats.data), their_times, host)


def rate(work: Floor | int, seconds: float) -> tuple[str, float]:
    """Unit and value: GFLOP/s of products, GB/s of what has none; images/s of so many images."""
    if isinstance(work, int):
        return "images/s", work / seconds
    if work.flops:
        return "GFLOP/s", work.flops / seconds / 1e9
    return "GB/s", work.size / seconds / 1e9


class Rates(NamedTuple):
    """What a GPU reaches on a large product and on a large copy: a floor for every time."""

    flops: float  # a second
    bytes: float  # a second, read and written

    def floor(self, work: Floor) -> float:
        """The least seconds for so much work."""
        return max(work.flops / self.flops, work.size / self.bytes)

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
