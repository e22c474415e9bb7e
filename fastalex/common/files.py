"""Files that are never half written."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

# What ``replacing`` calls its files, and what safetensors called its own, which older versions of
# fastalex left behind when they were killed.
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp|\.tmp\w{6}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; it takes the place of ``path``, on disk, when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the error above is the one to know
            temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def is_temporary(path: Path) -> bool:
    """Whether a killed process left ``path`` before it took its place."""
    return _TEMPORARY.fullmatch(path.name) is not None
