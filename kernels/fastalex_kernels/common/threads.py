"""Work on a CPU in parallel, each thread with torch operators of its own."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .backend import backend, chosen


def _start_worker(ready: threading.Barrier) -> None:
    torch.get_num_threads()  # a thread's first question sets its number to that of all
    torch.set_num_threads(1)
    ready.wait()


@functools.cache
def _workers(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of ``process`` in which torch's operators start no threads of their own."""
    ready = threading.Barrier(threads + 1)
    workers = ThreadPoolExecutor(threads, "fastalex", _start_worker, (ready,))
    for _ in range(threads):
        workers.submit(int)
    ready.wait()
    torch.set_num_threads(threads)  # a worker's number had become that of threads yet to start
    return workers


def share(function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
    """``list(map(function, *arguments))`` on as many threads of a CPU as torch uses.

    So a pass is one parallel region. With one for each operator, every operator would wait for the
    slowest thread: where another process has one of the cores, that takes a hundred times as long.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(arguments[0]) == 1:
        return list(map(function, *arguments))
    name = chosen()

    def work(*some: Any) -> Any:
        with torch.no_grad(), backend(name):  # which a thread chooses for itself
            return function(*some)

    return list(_workers(threads, os.getpid()).map(work, *arguments))
