"""The tile of a problem: one that was found by timing on this GPU, or a tile table's.

``python -m fastalex.tune`` writes a table, one JSON file for each GPU. It is read at the first
launch on a device, from the path in ``FASTALEX_TILES`` or from the user's cache folder, and holds
only for the device, the Triton and the kernels that it was made with.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor

from ..common.backend import device_name, replaced, target

VARIABLE = "FASTALEX_TILES"
# Of a GPU of each target: A100, RTX 3090, RTX 4090, H100, B200, B300, RTX 5090, MI300X. What is
# chosen by them is a speed, and the same everywhere.
PROCESSORS = {
    "sm_80": 108, "sm_86": 82, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_103": 148,
    "sm_120": 170, "gfx942": 304,
}  # fmt: skip
_TILES_OF = {"sm_103": "sm_100"}  # the same hardware to a kernel

Tile = tuple[int, ...]
Tiles = Mapping[Any, Tile]  # by target and bits of an operand, "tf32" or any
Key = tuple[str, str, tuple[int, ...]]  # kernel, kind of operand, sizes of the problem

_PRODUCT = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
FIELDS = {  # what a tile holds, by kernel; a name's first word is the op, a folder of the package
    "conv2d forward": _PRODUCT,
    "conv2d input": _PRODUCT,
    "conv2d run": ("pixels",),  # of Gluon's kernel; of 1 the plain one runs
    "conv2d weight": _PRODUCT,
    "conv2d weight parts": ("parts",),  # of the reduction, for the tile taken
    "linear": _PRODUCT,
    "linear parts": ("parts",),
    "linear half parts": ("parts",),  # of a product of which a half is begun
    "linear update": _PRODUCT,
    "linear backward": ("BLOCK_N", "BLOCK_K", "num_warps", "num_stages"),  # both in one pass
    "lrn forward": ("chunks", "strip", "rows"),
    "lrn backward": ("chunks", "rows"),
    "pool forward": ("BLOCK_M", "num_warps"),  # with LRN too, where its sizes are not AlexNet's
    "pool backward": ("BLOCK_M", "num_warps"),
}
_FOLDERS = {"lrn": "lrn_pool", "pool": "lrn_pool"}  # of ops that bear another name
_OPS = {name: _FOLDERS.get(name.split()[0], name.split()[0]) for name in FIELDS}

_choice: Any = SimpleNamespace(chooser=None)  # not of a thread: backward has threads


def choosing(chooser: Callable[[Key, Tile], Tile]) -> contextlib.AbstractContextManager[None]:
    """Let ``chooser(key, tile)`` say which tile is taken instead of ``tile``, the tables' own."""
    return replaced(_choice, "chooser", chooser)


def tile_entry(tiles: Tiles, x: Tensor, kernel: str, *sizes: int) -> Tile:
    """The tile of a problem of ``sizes``: tuned on this GPU, or what a table holds for ``x``."""
    return tuned(own_tile(tiles, x, kernel), x, kernel, *sizes)


def own_tile(tiles: Tiles, x: Tensor, kernel: str) -> Tile:
    """What a table holds for operands like ``x``."""
    name, bits = target(x.device), 8 * x.element_size()
    name = _TILES_OF.get(name, name)
    precision = dot_precision(x, kernel)
    kinds = ((name, precision), (name, bits), name, ("other", precision), ("other", bits))
    return next(tiles[kind] for kind in kinds if kind in tiles)


def tuned(own: Tile, x: Tensor, kernel: str, *sizes: int) -> Tile:
    """What was found best for ``kernel``, one of ``FIELDS``, on operands like x; or ``own``."""
    kind = "tf32" if dot_precision(x, kernel) == "tf32" else str(x.dtype).removeprefix("torch.")
    key = (kernel, kind, sizes)
    if _choice.chooser is not None:
        return tuple(_choice.chooser(key, own))
    device = device_name(x.device)
    return own if device is None else _table(device).get(key, own)


def cut(block: int, size: int) -> int:
    """A block no longer than an axis of ``size`` needs, and no shorter than ``tl.dot`` takes."""
    return max(16, min(block, int(triton.next_power_of_2(size))))


def dot_precision(x: Tensor, kernel: str) -> str:
    """``tl.dot``'s input precision: TF32 for float32 where torch's settings for such ops say so."""
    if x.dtype != torch.float32:
        return "ieee"
    # Torch's settings are slow to read, and this runs before every launch.
    settings: Any = torch.backends.cuda.matmul
    if kernel.startswith("conv2d"):
        if not target(x.device).startswith("sm_"):  # where there is no cuDNN
            return "ieee"
        settings = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" if settings.fp32_precision == "tf32" else "ieee"


def table_path(device: str) -> Path:
    """Where the table of a GPU is read from: ``FASTALEX_TILES``, or the user's cache folder."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return Path(cache) / "fastalex" / f"tiles_{name}.json"


@functools.cache
def kernel_version(op: str) -> str:
    """A fingerprint of the functions that are compiled of an op, a folder, without comments."""
    package = Path(__file__).parents[1]
    files = [p for folder in ("common", op) for p in sorted((package / folder).glob("*.py"))]
    functions = [
        ast.unparse(node)
        for path in files
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and {"triton.jit", "gluon.jit"} & set(map(ast.unparse, node.decorator_list))
    ]
    return hashlib.sha256("\n".join(functions).encode()).hexdigest()[:16]


def identity(device: str) -> dict[str, Any]:
    """What a table has to agree with to be used; of ``kernels``, op by op."""
    kernels = {op: kernel_version(op) for op in sorted(set(_OPS.values()))}
    return {"device": device, "triton": triton.__version__, "kernels": kernels}


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
    """The tiles of a table, without those of ops whose kernels have changed since.

    Raises:
        OSError, ValueError: where it can't be read, or is of something else than runs here.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    here = identity(device)
    try:
        same = {op for op, version in here["kernels"].items() if content["kernels"][op] == version}
        for name, value in here.items():
            if content[name] != value and not (name == "kernels" and same):
                given = f"{name} {content[name]}, here is {value}"
                raise ValueError(f"it is of {given}; run python -m fastalex.tune")
        if content["timed"] is not True:
            raise ValueError("it was computed, not timed")
        tiles = {
            (e["kernel"], e["kind"], tuple(e["sizes"])): tuple(e["tile"]) for e in content["tiles"]
        }
    except (KeyError, TypeError) as error:
        raise ValueError("it is no table of fastalex.tune") from error
    for (kernel, *_), tile in tiles.items():
        whole = all(type(x) is int and x > 0 for x in tile)
        if kernel not in FIELDS or len(tile) != len(FIELDS[kernel]) or not whole:
            raise ValueError(f"it holds {list(tile)} for a tile of {kernel}")
    return {key: tile for key, tile in tiles.items() if _OPS[key[0]] in same}
