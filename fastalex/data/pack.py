"""Pack a folder of images: each is decoded once, by as many processes as there are cores.

Shards that are done are kept, so that the same command goes on after any kind of end (see
``shard``). The manifest, which makes a set whole, is written last.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from fastalex.common.command_line import check_output
from fastalex.common.files import is_temporary, replacing
from fastalex.data.base import DataError
from fastalex.data.fingerprint import digest
from fastalex.data.folder import class_folders, image_files, stat_files
from fastalex.data.normalization import Moments
from fastalex.data.packed import (
    FORMAT,
    INDEX,
    MANIFEST,
    WORK,
    file_digest,
    read_manifest,
)
from fastalex.data.shard import Record, Shard, pack_shards

SIZE = 256  # P§2
_SHARD_IMAGES = 1024  # 200 MB at 256 pixels
_LEAST_SHARD_IMAGES = 64
_SHARDS = 64  # that many at least, if they do not get too small, for as many processes
VAL_SPLIT = 0.1  # of the images of each class, where there is no folder of validation images
ODD, LEFT_OUT = "odd.tsv", "left_out.tsv"


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
        val_split: see ``find_images``.
        quiet: show no progress.

    Raises:
        DataError: one line on what is wrong, and what of an interrupted work is kept.
        PackingStopped: likewise, after Ctrl-C.
    """
    source, root = Path(os.path.realpath(source)), Path(os.path.realpath(root))  # of loops too
    if source == root or source in root.parents:
        raise DataError(f"{root}: lies in the folder that is packed; name one outside {source}")
    images = find_images(source, val_split)
    plan = {"format": FORMAT, "size": size, "files": digest([images.parts, images.bytes])}
    if _is_whole(root, plan):
        return _summary(root, 0, 0.0)
    shards = _shards(source, images, root, size)
    _require_space(root, shards)
    check_output("DST", root, folder=True)
    existed = root.exists()
    (root / WORK).mkdir(parents=True, exist_ok=True)
    with _alone(root):
        _remove_leftovers(root, shards)
        with replacing(root / WORK / "plan.json") as temporary:
            temporary.write_text(json.dumps(plan))
        for part in images.parts:
            (root / part).mkdir(exist_ok=True)
        started = time.monotonic()
        decoded = pack_shards(shards, workers, quiet)
        seconds = time.monotonic() - started
        try:
            _finish(images, shards, root, plan)
        except DataError:  # nothing of a part can be read, nor will it be the next time
            for name in (*images.parts, WORK):
                shutil.rmtree(root / name)
            if not existed:
                root.rmdir()
            raise
    shutil.rmtree(root / WORK)
    return _summary(root, decoded, seconds)


class ImageFiles(NamedTuple):
    """Every image file of a folder that is to be packed.

    Attributes:
        classes: sorted names.
        parts: the files of "train" and of "val", if any, as paths below the folder.
        bytes: the size of each file, in the same order; -1 of a link that leads nowhere.
    """

    classes: list[str]
    parts: dict[str, list[str]]
    bytes: dict[str, list[int]]


def find_images(source: Path, val_split: float | None = None) -> ImageFiles:
    """List ``source/train/CLASS/*`` and ``source/val/CLASS/*``, or ``source/CLASS/*``.

    Args:
        source: the folder.
        val_split: share of each class's images, evenly spaced, that become validation images
            where the folder has none apart; None is a tenth.

    Raises:
        DataError: where the folder has another layout, or a class has no image file.
    """
    if val_split is not None and not 0 <= val_split < 1:
        raise DataError(f"--val-split: expected at least 0 and below 1, got {val_split}")
    if not source.is_dir():
        what = "not a folder" if source.exists() else "no such folder"
        raise DataError(f"{source}: {what}; images go in CLASS, or train/CLASS and val/CLASS")
    train, val = source / "train", source / "val"
    if val.is_dir() and not train.is_dir():
        raise DataError(f"{source}: a val folder and no train folder beside it")
    if val.is_dir() and val_split is not None:
        raise DataError(f"--val-split {val_split}: {val} has the validation images")
    root = train if train.is_dir() else source
    classes = class_folders(root)
    files: dict[str, list[Path]] = {"train": [], "val": []}
    share = VAL_SPLIT if val_split is None else val_split
    for path in (root / name for name in classes):
        for i, file in enumerate(_files_of_class(path)):
            kept = not val.is_dir() and math.floor((i + 1) * share) > math.floor(i * share)
            files["val" if kept else "train"].append(file)
    if val.is_dir():
        for name in class_folders(val, classes):
            files["val"] += _files_of_class(val / name)
    if not files["val"]:
        del files["val"]
    parts = {part: [p.relative_to(source).as_posix() for p in files[part]] for part in files}
    sizes = {part: [size for _, size, _ in stat_files(files[part])] for part in files}
    return ImageFiles(classes, parts, sizes)


def _files_of_class(folder: Path) -> list[Path]:
    files = image_files(folder)
    if not files:
        raise DataError(f"{folder}: no image in it; put some there or remove the folder")
    return files


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


def _shards(source: Path, images: ImageFiles, root: Path, size: int) -> list[Shard]:
    """The work, cut by the number of images alone: any number of processes makes the same set."""
    total = sum(map(len, images.parts.values()))
    length = min(_SHARD_IMAGES, max(_LEAST_SHARD_IMAGES, total // _SHARDS))
    return [
        Shard(source, root, part, number, files[start : start + length], size)
        for part, files in images.parts.items()
        for number, start in enumerate(range(0, len(files), length))
    ]


def _remove_leftovers(root: Path, shards: list[Shard]) -> None:
    """Remove what killed processes, and unfinished work of older versions, left behind."""
    kept = {"lock", "plan.json", *(shard.record.name for shard in shards)}
    for path in root.rglob("*"):
        in_work = path.parent.name == WORK and path.name not in kept
        if path.is_file() and (in_work or is_temporary(path)):
            path.unlink()


def _require_space(root: Path, shards: list[Shard]) -> None:
    """Raise DataError where the set and what is on disk while it is made do not fit."""
    pixels = 3 * shards[0].size ** 2
    needed = sum(len(shard.files) * (pixels + 512) + 4 * pixels + 8192 for shard in shards)
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


def _finish(images: ImageFiles, shards: list[Shard], root: Path, plan: dict[str, Any]) -> None:
    """Write index, statistics and, last, the manifest."""
    moments = Moments(plan["size"])
    parts, remarks, number = {}, [], {name: i for i, name in enumerate(images.classes)}
    for part, files in images.parts.items():
        records: list[Record] = []
        counts = []
        for shard in (shard for shard in shards if shard.part == part):
            some, of_shard = shard.recorded()
            records += some
            counts.append(of_shard.images)
            if part == "train":
                moments.merge(of_shard)
        packed = [record for record in records if record.checksum is not None]
        if not packed:
            reason = f"{len(files)} can't be: {records[0].remark}"
            source = shards[0].source
            raise DataError(f"{source}: no {part} image of it can be read ({reason})")
        remarks += [record for record in records if record.remark]
        parts[part] = {"images": len(packed), "shards": counts}
        labels = [number[PurePosixPath(record.file).parent.name] for record in packed]
        checksums = [record.checksum for record in packed]
        paths = json.dumps([record.file for record in packed])
        index = (_npy(labels, np.int64), _npy(checksums, np.uint32), paths.encode())
        for name, data in zip(INDEX, index, strict=True):
            _save(root / part / name, data)
    _save(root / "mean.npy", _npy(moments.mean_image(), np.float32))
    _save(root / ODD, _table([record for record in remarks if record.checksum is not None]))
    _save(root / LEFT_OUT, _table([record for record in remarks if record.checksum is None]))
    mean, covariance = moments.mean_and_covariance()
    names = ["mean.npy", ODD, LEFT_OUT, *(f"{part}/{name}" for part in parts for name in INDEX)]
    manifest = {
        "format": FORMAT,
        "plan": plan,
        "size": plan["size"],
        "source": str(shards[0].source),
        "classes": images.classes,
        "parts": parts,
        "channel_mean": mean.tolist(),
        "covariance": covariance.tolist(),
        "files": {name: file_digest(root / name) for name in names},
    }
    whole = {**manifest, "sha256": digest(manifest)}
    _save(root / MANIFEST, (json.dumps(whole, indent=1) + "\n").encode())


def _npy(values: Any, kind: type[np.generic]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values, kind))
    return buffer.getvalue()


def _save(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


# What would end a field or a line of a table, and the backslash.
_ESCAPES: dict[str, str | int | None] = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}


def _table(records: list[Record]) -> bytes:
    """A line of file and remark for each record."""
    escapes = str.maketrans(_ESCAPES)
    lines = (
        f"{r.file.translate(escapes)}\t{(r.remark or '').translate(escapes)}\n" for r in records
    )
    return "".join(lines).encode(errors="surrogateescape")


def _read_table(path: Path) -> list[tuple[str, str]]:
    """The inverse of ``_table``."""
    back = {str(escape): character for character, escape in _ESCAPES.items()}
    text = path.read_bytes().decode(errors="surrogateescape")
    rows = (
        [re.sub(r"\\[\\tnr]", lambda found: back[found[0]], field) for field in line.split("\t")]
        for line in text.split("\n")[:-1]
    )
    return [(file, remark) for file, remark in rows]


def _summary(root: Path, decoded: int, seconds: float) -> Packed:
    manifest = read_manifest(root)
    counts = {part: about["images"] for part, about in manifest["parts"].items()}
    return Packed(counts, _read_table(root / LEFT_OUT), _read_table(root / ODD), decoded, seconds)
