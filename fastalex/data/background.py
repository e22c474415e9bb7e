"""Work done ahead of its use by a few threads; Pillow and numpy release the interpreter's lock."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(
    function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int
) -> Iterator[R]:
    """``map(function, items)``, in order, by ``workers`` threads and up to ``ahead`` items early.

    An exception of ``function`` is raised here, at its item's turn. However the iteration ends (at
    the last item, by an exception, by Ctrl-C, or dropped half-way), work not begun is cancelled
    and the threads have ended when this returns.

    Args:
        function: called once for each item; must be safe to call from several threads.
        items: what to map; drawn from no further than ``ahead`` items before they are needed.
        workers: number of threads; 0 calls ``function`` here, when its result is asked for.
        ahead: how many items may be under way or waiting to be taken.
    """
    if workers == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, "fastalex-data", _take_device, _device())
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _device() -> tuple[int, ...]:
    """The GPU of this thread, of which a process knows only if it uses one; empty where none."""
    torch: Any = sys.modules.get("torch")  # packing does without it
    used = torch is not None and torch.cuda.is_initialized()
    return (torch.cuda.current_device(),) if used else ()


def _take_device(*device: int) -> None:
    """Use the GPU that the thread uses which started this one, not the first."""
    if device:
        sys.modules["torch"].cuda.set_device(device[0])
