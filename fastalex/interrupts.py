"""Ctrl-C while a command line is still being imported; torch alone takes a second of that."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

INTERRUPTED = 130  # exit code


def command_line_starts() -> bool:
    """Whether Python is on its way to ``python -m fastalex.NAME``, and has not found it yet."""
    return sys.argv[:1] == ["-m"]  # until then; afterwards it is the path of the module


def end_quietly() -> None:
    """Let Ctrl-C end this process with one line, until ``raise_again``.

    KeyboardInterrupt can't do that: it would come out of whatever is being imported, as itself, as
    another exception, or not at all.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, as it does in any Python, from now on."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(signum: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":  # one line for all processes of torchrun
        modules = [part for part in sys.orig_argv if part.startswith("fastalex.")]
        name = modules[0].removeprefix("fastalex.") if modules else "fastalex"
        # Past Python's own buffer: what was interrupted may be writing to it.
        os.write(2, f"{name}: interrupted while starting, nothing was written\n".encode())
    os._exit(INTERRUPTED)
