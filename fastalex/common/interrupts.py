"""The signals that ask a training run to end; nothing is installed by an import."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPTED = 130  # exit code after Ctrl-C

# Ctrl-C, a closed terminal, and what a scheduler sends before it takes the machine away.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_ONE_REQUEST = 1.0  # seconds in which a terminal and a launcher pass on one and the same request

_requested: int | None = None
_since = -_ONE_REQUEST


class Interrupted(BaseException):
    """A signal asked the run to end, Ctrl-C for one; the message is its name and ``note``.

    Like KeyboardInterrupt no Exception: it can come anywhere, and ``Thread.start``, for one, undoes
    the start of a thread that runs already when an Exception comes out of it.
    """

    def __init__(self, signum: int, note: str = "") -> None:
        super().__init__(signal.Signals(signum).name + note)
        self.signum, self.note = signum, note


def requested() -> int | None:
    """The number of the signal that asked this process to end, inside ``noticed``."""
    return _requested


@contextlib.contextmanager
def noticed() -> Iterator[None]:
    """Inside the block ``requested`` tells of the first of SIGNALS; a second raises Interrupted.

    A SIGHUP that nohup has the process ignore stays ignored.
    """
    global _requested
    _requested = None
    try:
        with _handled(_note):
            yield
    finally:
        _requested = None


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Inside the block each of SIGNALS raises Interrupted, but for an ignored SIGHUP."""
    with _handled(_raise):
        yield


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                previous[signum] = signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, old in previous.items():
            signal.signal(signum, old)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Keep SIGNALS waiting until the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _raise(signum: int, frame: FrameType | None) -> None:
    if time.monotonic() - _since > _ONE_REQUEST:
        raise Interrupted(signum)


def _note(signum: int, frame: FrameType | None) -> None:
    global _requested, _since
    if _requested is None:
        _requested, _since = signum, time.monotonic()
    elif time.monotonic() - _since > _ONE_REQUEST:
        raise Interrupted(_requested)
