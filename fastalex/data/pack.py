"""Pack a folder of images: each is decoded once, by as many processes as there are cores.

What is on disk tells how far the work is, so that it goes on after any kind of end: see ``shard``.
The manifest, which makes a set whole, is written last.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastalex.common.command_line import check_output
from fastalex.common.files import replacing
from fastalex.data.base import DataError
from fastalex.data.fingerprint import digest
from fastalex.data.listing import Listing, class_of
from fastalex.data.packed import (
    FORMAT,
    INDEX,
    MANIFEST,
    MAX_SIZE,
    WORK,
    file_digest,
    read_manifest,
)
from fastalex.data.processes import pack_shards
from fastalex.data.shard import Record, Shard
from fastalex.data.sums import Sums

SIZE = 256  # P§2
_SHARD_IMAGES = 1024  # 200 MB at 256 pixels
_LEAST_SHARD_IMAGES = 64
_SHARDS = 64  # that many at least, if they do not get too small, for as many processes
ODD, LEFT_OUT = "odd.tsv", "left_out.tsv"


class NothingReadable(DataError):
    """Of one part no image can be read, so that there is no set to make."""


@dataclass(frozen=True)
class Packed:
    """What a packing made.

    Attributes:
        counts: images by part.
        left_out: (path, reason) of each file that could not be read.
        odd: (path, remark) of packed ones that may not be what they seem.
        decoded: files that were decoded now; the others were done before.
        seconds: for these.
    """

    counts: dict[str, int]
    left_out: list[tuple[str, str]]
    odd: list[tuple[str, str]]
    decoded: int
    seconds: float


def pack(
    source: Path,
    root: Path,
    size: int = SIZE,
    workers: int | None = None,
    val_split: float | None = None,
    quiet: bool = False,
) -> Packed:
    """Make the packed set ``root`` from the images of ``source``, or go on making it.

    The shorter side of an image becomes ``size``, and the middle of the longer one is kept (P§2).

    Args:
        source: ``train/CLASS/*`` and ``val/CLASS/*``, or ``CLASS/*``.
        root: a new or empty folder, or an unfinished packing of the same images.
        size: side in pixels of the packed images.
        workers: processes at work at a time; None is one for each core that this one may use.
        val_split: see ``Listing.read``.
        quiet: show no progress.

    Raises:
        DataError: one line on what is wrong, and what of an interrupted work is kept.
        PackingStopped: likewise, after Ctrl-C.
    """
    if not 1 <= size <= MAX_SIZE:
        raise DataError(f"--size: expected 1 to {MAX_SIZE}, got {size}")
    if workers is not None and workers < 1:
        raise DataError(f"--workers: expected at least 1, got {workers}")
    source, root = Path(os.path.realpath(source)), Path(os.path.realpath(root))  # of loops too
    if source == root or source in root.parents:
        raise DataError(f"{root}: lies in the folder that is packed; name one outside {source}")
    listing = Listing.read(source, val_split)
    plan = {"format": FORMAT, "size": size, "files": digest([listing.parts, listing.bytes])}
    if _is_whole(root, plan):
        return _summary(root, 0, 0.0)
    shards = _shards(listing, root, size)
    _require_space(root, _needed(shards))
    check_output("DST", root, folder=True)
    existed = root.exists()
    (root / WORK).mkdir(parents=True, exist_ok=True)
    with _alone(root):
        with replacing(root / WORK / "plan.json") as temporary:
            temporary.write_text(json.dumps(plan))
        for part in listing.parts:
            (root / part).mkdir(exist_ok=True)
        started = time.monotonic()
        decoded = pack_shards(shards, workers, quiet)
        seconds = time.monotonic() - started
        try:
            _finish(listing, shards, root, plan)
        except NothingReadable:  # nor will it be the next time
            for name in (*listing.parts, WORK):
                shutil.rmtree(root / name)
            if not existed:
                root.rmdir()
            raise
    shutil.rmtree(root / WORK)
    return _summary(root, decoded, seconds)


def _is_whole(root: Path, plan: dict[str, Any]) -> bool:
    """Whether the very set is there already.

    Raises:
        DataError: where anything else is there, but for an unfinished packing of the same images.
    """
    if root.exists() and not root.is_dir():
        raise DataError(f"{root}: not a folder; name a new one")
    another = DataError(
        f"{root}: holds a packed set of other images, or of another size; name a new folder"
    )
    if (root / MANIFEST).exists():
        if read_manifest(root)["plan"] != plan:
            raise another
        shutil.rmtree(root / WORK, ignore_errors=True)  # of a run killed after its last word
        return True
    path = root / WORK / "plan.json"
    if path.exists():
        if json.loads(path.read_text()) != plan:
            raise another
    elif root.exists() and {entry.name for entry in root.iterdir()} - {WORK}:
        raise DataError(f"{root}: exists and is not an empty folder; name another one")
    return False


def _shards(listing: Listing, root: Path, size: int) -> list[Shard]:
    """The work, cut by the number of images alone: any number of processes makes the same set."""
    length = min(_SHARD_IMAGES, max(_LEAST_SHARD_IMAGES, len(listing) // _SHARDS))
    return [
        Shard(listing.source, root, part, number, files[start : start + length], size)
        for part, files in listing.parts.items()
        for number, start in enumerate(range(0, len(files), length))
    ]


def _needed(shards: list[Shard]) -> int:
    """Bytes of the whole set and of what is on disk only while it is made."""
    pixels = 3 * shards[0].size ** 2
    return sum(len(shard.files) * (pixels + 512) + 4 * pixels + 8192 for shard in shards)


def _require_space(root: Path, needed: int) -> None:
    there = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    place = next(path for path in (root, *root.parents) if path.exists())
    free, more = shutil.disk_usage(place).free, needed - there
    if free < more:
        raise DataError(
            f"{root}: packing needs {_size(more)} and {_size(free)} are free; "
            f"free {_size(more - free)} more or name another disk"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    with open(root / WORK / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{root}: another process is packing into it; wait for it") from error
        yield


def _finish(listing: Listing, shards: list[Shard], root: Path, plan: dict[str, Any]) -> None:
    """Write index, statistics and, last, the manifest."""
    parts, remarks = {}, []
    sums = Sums.zero(plan["size"])
    for part in listing.parts:
        records = [shard.records() for shard in shards if shard.part == part]
        packed = [[record for record in some if record.checksum is not None] for some in records]
        if not any(packed):
            reasons = f"{sum(map(len, records))} can't be: {records[0][0].remark}"
            raise NothingReadable(
                f"{listing.source}: no {part} image of it can be read ({reasons})"
            )
        _save_index(root / part, listing, [record for some in packed for record in some])
        parts[part] = {"images": sum(map(len, packed)), "shards": [len(some) for some in packed]}
        remarks += [record for some in records for record in some if record.remark]
    for shard in shards:
        if shard.part == "train":
            sums.merge(shard.sums())
    _save_array(root / "mean.npy", sums.mean_image().astype(np.float32))
    _save_table(root / ODD, [record for record in remarks if record.checksum is not None])
    _save_table(root / LEFT_OUT, [record for record in remarks if record.checksum is None])
    mean, covariance = sums.moments()
    names = ["mean.npy", ODD, LEFT_OUT, *(f"{part}/{name}" for part in parts for name in INDEX)]
    manifest = {
        "format": FORMAT,
        "plan": plan,
        "size": plan["size"],
        "source": str(listing.source),
        "classes": listing.classes,
        "parts": parts,
        "channel_mean": mean.tolist(),
        "covariance": covariance.tolist(),
        "files": {name: file_digest(root / name) for name in names},
    }
    whole = {**manifest, "sha256": digest(manifest)}
    _save_text(root / MANIFEST, json.dumps(whole, indent=1) + "\n")


def _save_index(folder: Path, listing: Listing, packed: list[Record]) -> None:
    number = {name: index for index, name in enumerate(listing.classes)}
    labels = [number[class_of(record.file)] for record in packed]
    _save_array(folder / "labels.npy", np.array(labels, np.int64))
    checksums = [record.checksum for record in packed]
    _save_array(folder / "checksums.npy", np.array(checksums, np.uint32))
    _save_text(folder / "names.json", json.dumps([record.file for record in packed]))


def _save_array(path: Path, array: npt.NDArray[Any]) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


def _save_table(path: Path, records: list[Record]) -> None:
    lines = (f"{_escaped(record.file)}\t{_escaped(record.remark or '')}\n" for record in records)
    _save_text(path, "".join(lines))


def _save_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode(errors="surrogateescape"))


def _table(path: Path) -> list[tuple[str, str]]:
    text = path.read_bytes().decode(errors="surrogateescape")
    rows = (line.partition("\t") for line in text.split("\n")[:-1])
    return [(_unescaped(file), _unescaped(remark)) for file, _, remark in rows]


# What would end a field or a line of a table, and the backslash.
_ESCAPES: dict[str, str | int | None] = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}


def _escaped(text: str) -> str:
    return text.translate(str.maketrans(_ESCAPES))


def _unescaped(text: str) -> str:
    back = {str(escape): character for character, escape in _ESCAPES.items()}
    return re.sub(r"\\[\\tnr]", lambda found: back[found[0]], text)


def _summary(root: Path, decoded: int, seconds: float) -> Packed:
    manifest = read_manifest(root)
    counts = {part: about["images"] for part, about in manifest["parts"].items()}
    return Packed(counts, _table(root / LEFT_OUT), _table(root / ODD), decoded, seconds)
