"""The other tower, in a thread of this process: the one stand-in of the tests."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
_SECONDS = 300.0  # until a tower that waits for ever is given up


@dataclass
class PairExchange:
    """One of two ends; what one sends the other receives, in the order of the starts."""

    rank: int
    out: queue.Queue[torch.Tensor]
    into: queue.Queue[torch.Tensor]
    events: list[str] = field(default_factory=list)

    def transfer(self, sent: torch.Tensor) -> _Transfer:
        assert sent.is_contiguous()
        return _Transfer(self, sent)


class _Transfer:
    def __init__(self, exchange: PairExchange, sent: torch.Tensor) -> None:
        self._exchange, self._sent = exchange, sent
        self.both = torch.full((2, *sent.shape), float("nan")).to(sent)
        self.received = self.both[1 - exchange.rank]

    def start(self) -> None:
        self._exchange.events.append("start")
        self._exchange.out.put(self._sent.clone())

    def wait(self) -> None:
        self._exchange.events.append("wait")
        self.both[self._exchange.rank].copy_(self._sent)
        self.received.copy_(self._exchange.into.get(timeout=_SECONDS))


def run_towers(tower: Callable[[PairExchange], Result]) -> list[Result]:
    """Run ``tower`` for both ends at once; its results, tower 0's first."""
    queues: list[queue.Queue[torch.Tensor]] = [queue.Queue(), queue.Queue()]
    results: list[Any] = [None, None]

    def run(rank: int) -> None:
        try:
            results[rank] = tower(PairExchange(rank, queues[rank], queues[1 - rank]))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
