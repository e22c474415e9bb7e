"""What the command lines share: arguments, and one line where something is wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

import torch

REFUSED, INTERRUPTED = 2, 130  # exit codes


class Parser(argparse.ArgumentParser):
    """An argparse parser that answers a wrong command line with one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"{self.prog}: error: {message} (--help lists the options)\n")


def at_least_one(text: str) -> int:
    """An argument that is a whole number from 1 on."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def guarded(name: str, command: Callable[[], int], nothing: str = "nothing was written") -> int:
    """Call ``command``; what a user did wrong and Ctrl-C become one line on stderr.

    Args:
        name: of the program, in front of the line.
        command: returns the exit code.
        nothing: what an interruption leaves behind.

    Returns:
        The command's exit code; 2 where it raised ValueError or OSError or ran out of GPU memory,
        130 after Ctrl-C.
    """
    try:
        return command()
    except (ValueError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return REFUSED
    except torch.OutOfMemoryError:
        print(f"{name}: error: out of GPU memory, try a smaller --batch-size", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"{name}: interrupted, {nothing}", file=sys.stderr)
        return INTERRUPTED
