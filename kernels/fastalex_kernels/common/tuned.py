"""Tiles that were found by timing on this GPU, in place of those of the tile tables.

``python -m fastalex.tune`` writes a table, one JSON file for each GPU. It is read at the first
launch on a device, from the path in ``FASTALEX_TILES`` or from the user's cache folder, and holds
only for the device, the Triton and the kernels that it was made with.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import triton

VARIABLE = "FASTALEX_TILES"

Tile = tuple[int, ...]
Key = tuple[str, str, tuple[int, ...]]  # kernel, kind of operand, sizes of the problem

_PRODUCT = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
FIELDS = {  # what a tile holds, by kernel
    "conv2d forward": _PRODUCT,
    "conv2d input": _PRODUCT,
    "conv2d weight": _PRODUCT,
    "conv2d weight parts": ("parts",),  # of the reduction, for the tile taken
    "linear": _PRODUCT,
    "linear parts": ("parts",),
    "linear half parts": ("parts",),  # of a product of which a half is begun
    "linear update": _PRODUCT,
    "lrn forward": ("chunks", "strip", "rows"),
    "lrn backward": ("chunks", "rows"),
    "pool forward": ("BLOCK_M", "num_warps"),  # with LRN too, where its sizes are not AlexNet's
    "pool backward": ("BLOCK_M", "num_warps"),
}

_chooser: Callable[[Key, Tile], Tile] | None = None  # not a context variable: backward has threads


@contextlib.contextmanager
def choosing(chooser: Callable[[Key, Tile], Tile]) -> Iterator[None]:
    """Let ``chooser(key, tile)`` say which tile is taken instead of ``tile``, the tables' own."""
    global _chooser
    previous, _chooser = _chooser, chooser
    try:
        yield
    finally:
        _chooser = previous


def tuned_tile(key: Key, tile: Tile, device: str | None) -> Tile:
    """The tuned tile of a problem, or ``tile`` where none was found.

    Args:
        device: the GPU's name; None where the launch is only recorded.
    """
    if _chooser is not None:
        return _chooser(key, tile)
    return tile if device is None else _table(device).get(key, tile)


def default_path(device: str) -> Path:
    """Where the table of a GPU lies: in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return Path(cache) / "fastalex" / f"tiles_{name}.json"


def table_path(device: str) -> Path:
    """Where the table of a GPU is read from."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else default_path(device)


@functools.cache
def kernels_version() -> str:
    """A fingerprint of the kernels' source: another kernel may want another tile."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def identity(device: str) -> dict[str, Any]:
    """What a table has to agree with to be used."""
    return {"device": device, "triton": triton.__version__, "kernels": kernels_version()}


@functools.cache
def _table(device: str) -> dict[Key, Tile]:
    """The tiles of a device's table; none, with a warning, where it is not of these kernels."""
    path = table_path(device)
    if VARIABLE not in os.environ and not path.exists():
        return {}
    try:
        return read_table(path, device)
    except (OSError, ValueError) as error:
        warnings.warn(f"tile table {path} is not used: {error}", stacklevel=2)
        return {}


def read_table(path: Path, device: str) -> dict[Key, Tile]:
    """The tiles of a table.

    Raises:
        OSError, ValueError: where it can't be read, or is of something else than runs here.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        for name, here in identity(device).items():
            if content[name] != here:
                raise ValueError(
                    f"it is of {name} {content[name]}, here is {here}; run python -m fastalex.tune"
                )
        if content["timed"] is not True:
            raise ValueError("it was computed, not timed")
        entries = [
            ((e["kernel"], e["kind"], tuple(e["sizes"])), e["tile"]) for e in content["tiles"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError("it is no table of fastalex.tune") from error
    for (kernel, *_), tile in entries:
        fields = FIELDS.get(kernel, ())
        if len(tile) != len(fields) or not all(type(x) is int and x > 0 for x in tile):
            raise ValueError(f"it holds {tile} for a tile of {kernel}")
    return {key: tuple(tile) for key, tile in entries}
