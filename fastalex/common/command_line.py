"""What the command lines share: arguments, and one line where something is wrong."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from fastalex._version import __version__
from fastalex.common.interrupts import INTERRUPTED

REFUSED = 2  # exit code


class Parser(argparse.ArgumentParser):
    """An argparse parser that answers a wrong command line with one line.

    Of torchrun's processes only the first says it. ``prog`` is ``python -m fastalex.NAME``. Options
    are whole; ``--help`` names the default of each that has one.
    """

    def __init__(self, **about: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **about})
        self.add_argument("--version", action="version", version=f"fastalex {__version__}")

    def add_flag(self, option: str, text: str) -> None:
        """An option that takes nothing."""
        self.add_argument(option, action="store_true", help=text)

    def add_count(
        self, option: str, text: str, default: int | None = None, most: int | None = None
    ) -> None:
        """An option that takes a whole number from 1 to ``most``."""
        text += "" if default is None else " (default: %(default)s)"
        kind = whole_number(1, most)
        self.add_argument(option, type=kind, default=default, metavar="N", help=text)

    def add_choice(self, option: str, choices: Iterable[Any], default: Any, text: str = "") -> None:
        """An option that takes one of ``choices``; None as the default is for ``text`` to say."""
        text += "" if default is None else " (default: %(default)s)"
        kind = type(default) if default is not None else str
        self.add_argument(option, type=kind, choices=tuple(choices), default=default, help=text)

    def add_path(self, name: str, text: str, metavar: str, **about: Any) -> None:
        """An option or argument that takes a path."""
        text += "" if about.get("default") is None else " (default: %(default)s)"
        self.add_argument(name, type=Path, metavar=metavar, help=text, **about)

    def error(self, message: str) -> NoReturn:
        if os.environ.get("RANK", "0") == "0":
            name = self.prog.removeprefix("python -m fastalex.")
            print(f"{name}: error: {message} (--help lists the options)", file=sys.stderr)
        raise SystemExit(REFUSED)


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an argument that is a whole number from ``least`` to ``most``, both included."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least or (most is not None and value > most):
            limit = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"expected a whole number {limit}, got {text!r}")
        return value

    return convert


def check_output(option: str, path: Path, folder: bool = False) -> None:
    """Find, before any work, what would keep a command from writing its results; nothing is left.

    Args:
        option: names the path in the message.
        path: of the file, which may be there already, or of the folder, which may be made.
        folder: which of them it is.

    Raises:
        ValueError: one line that names the option.
    """
    try:
        place = path.absolute()
        if not folder and place.is_dir():
            raise ValueError(f"{option} {path}: a folder, name a file")
        if not folder and not _is_there(place := place.parent):
            raise ValueError(f"{option} {path}: its folder does not exist, make it")
        while not _is_there(place):
            place = place.parent
        if not place.is_dir():
            raise ValueError(f"{option} {path}: {place} is not a folder, name another place")
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ValueError(f"{option} {path}: can't be written: {why}; name another place") from error


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def guarded(name: str, command: Callable[[], int], nothing: str = "nothing was written") -> int:
    """Call ``command``; what a user did wrong and Ctrl-C become one line on stderr.

    Args:
        name: of the program, in front of the line.
        command: returns the exit code. The text of a KeyboardInterrupt that it raises is the line.
        nothing: what an interruption leaves behind.

    Returns:
        The command's exit code; 0 where the reader of its output had enough; 2 where it raised
        ValueError or OSError or ran out of GPU memory; 130 after Ctrl-C.
    """
    try:
        code = command()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return REFUSED
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which not every command imports
            raise
        print(f"{name}: error: out of GPU memory, try a smaller --batch-size", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt as stop:
        print(f"{name}: {str(stop) or f'interrupted, {nothing}'}", file=sys.stderr)
        return INTERRUPTED


class _Stream:
    """A stream of text whose file becomes the null device when it can't be written to."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> Any:
        return self._keep_going(lambda: self._stream.write(text))

    def flush(self) -> Any:
        return self._keep_going(self._stream.flush)

    def _keep_going(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            return call()


@contextlib.contextmanager
def output_may_fail() -> Iterator[None]:
    """Let the block go on when nobody reads its output, or the disk that takes it is full."""
    streams = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    out, err = map(_Stream, streams)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):  # type: ignore[type-var]
        yield
        out.flush()
