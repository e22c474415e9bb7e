"""Pack a folder of images: each is decoded once, by as many threads as there are cores.

A shard is done once its record is there, which is written last. Shards that are done are kept, so
that the same command goes on after any kind of end; one that was under way is made anew. The
manifest, which makes a set whole, is written at the very end.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import itertools
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from fastalex.common.command_line import check_output
from fastalex.common.files import is_temporary, replacing
from fastalex.data.base import DataError, Pixels, cores, map_ahead, printable
from fastalex.data.decode import read_whole, try_read
from fastalex.data.fingerprint import digest
from fastalex.data.folder import ImageFile, class_folders, image_files
from fastalex.data.normalization import Moments
from fastalex.data.packed import (
    FORMAT,
    HEADER,
    MANIFEST,
    WORK,
    crc32,
    file_digest,
    read_manifest,
    shard_header,
    shard_path,
)

SIZE = 256  # P§2
_SHARD_IMAGES = 1024  # 200 MB at 256 pixels
_LEAST_SHARD_IMAGES = 64
_SHARDS = 64  # that many at least, if they do not get too small: a stop loses one
VAL_SPLIT = 0.1  # of the images of each class, where there is no folder of validation images
ODD, LEFT_OUT = "odd.tsv", "left_out.tsv"
_ANOTHER = "holds a packed set of other images, or of another size; name a new folder"

Decoded = tuple[Pixels, str | None] | str  # with what is odd about it; or why it can't be read


class Record(NamedTuple):
    """What became of one file below the source folder: left out if it has no CRC-32 of pixels."""

    file: str
    checksum: int | None
    remark: str | None  # why it was left out, or what is odd about it


class Shard(NamedTuple):
    """What goes into shard ``number`` of a part: files below ``source``, at ``size`` pixels."""

    source: Path
    root: Path  # of the packed set
    part: str
    number: int
    files: list[str]
    size: int

    @property
    def path(self) -> Path:
        return shard_path(self.root, self.part, self.number)

    @property
    def record(self) -> Path:
        return self.root / WORK / f"{self.part}-{self.number:05d}.npz"

    def is_done(self) -> bool:
        return self.record.exists() and self.path.exists()

    def write(self, images: Iterable[Decoded]) -> None:
        """Write the shard and, last, what became of each file and the sums of the pixels."""
        records: list[Record] = []
        moments = Moments(self.size)
        with replacing(self.path) as temporary, open(temporary, "wb") as pixels:
            pixels.seek(HEADER)
            for file, decoded in zip(self.files, images, strict=True):
                if isinstance(decoded, str):
                    records.append(Record(file, None, decoded))
                    continue
                image, remark = decoded
                pixels.write(image.data)
                moments.add(image)
                records.append(Record(file, crc32(image.data), remark))
            pixels.seek(0)
            pixels.write(shard_header(moments.images, self.size))
        text = np.frombuffer(json.dumps(records).encode(), np.uint8)
        with replacing(self.record) as temporary, open(temporary, "wb") as record:
            np.savez(record, records=text, pixels=moments.pixels, products=moments.products)

    def recorded(self) -> tuple[list[Record], Moments]:
        """What ``write`` noted."""
        moments = Moments(self.size)
        with np.load(self.record) as saved:
            records = [Record(*values) for values in json.loads(saved["records"].tobytes())]
            moments.images = sum(record.checksum is not None for record in records)
            moments.pixels, moments.products = saved["pixels"], saved["products"]
        return records, moments


class Packed(NamedTuple):
    """What a packing made: images by part; files decoded now, in ``seconds``, and not before."""

    counts: dict[str, int]
    decoded: int
    seconds: float


def pack(
    source: Path,
    root: Path,
    size: int = SIZE,
    workers: int | None = None,
    val_split: float | None = None,
) -> Packed:
    """Make the packed set ``root`` from the images of ``source``, or go on making it.

    The shorter side of an image becomes ``size`` pixels, and the middle of the longer one is kept
    (P§2). ``workers`` images are decoded at a time; None is one for each core.

    Args:
        source: ``train/CLASS/*`` and ``val/CLASS/*``, or ``CLASS/*``; see ``find_images``.
        root: a new or empty folder, or an unfinished packing of the same images.

    Raises:
        DataError: one line on what is wrong, and what of an interrupted work is kept.
        KeyboardInterrupt: likewise, after Ctrl-C.
    """
    source, root = Path(os.path.realpath(source)), Path(os.path.realpath(root))  # of loops too
    if source == root or source in root.parents:
        raise DataError(f"{root}: lies in the folder that is packed; name one outside {source}")
    classes, found = find_images(source, val_split)
    sizes = {part: [file.size for file in files] for part, files in found.items()}
    parts = {
        part: [file.path.relative_to(source).as_posix() for file in files]
        for part, files in found.items()
    }
    plan = {"format": FORMAT, "size": size, "files": digest([parts, sizes])}
    if _is_whole(root, plan):
        return _summary(root, 0, 0.0)
    shards = _shards(source, parts, root, size)
    _require_space(root, shards)
    check_output("DST", root, folder=True)
    existed = root.exists()
    (root / WORK).mkdir(parents=True, exist_ok=True)
    with _alone(root):
        for path in filter(is_temporary, root.rglob("*")):  # of a killed process
            path.unlink()
        _save(root / WORK / "plan.json", json.dumps(plan).encode())
        for part in parts:
            (root / part).mkdir(exist_ok=True)
        started = time.monotonic()
        decoded = pack_shards(shards, workers or cores())
        seconds = time.monotonic() - started
        try:
            _finish(classes, shards, plan)
        except DataError:  # nothing of a part can be read, nor will it be the next time
            for name in (*parts, WORK):
                shutil.rmtree(root / name)
            if not existed:
                root.rmdir()
            raise
    shutil.rmtree(root / WORK)
    return _summary(root, decoded, seconds)


def pack_shards(shards: list[Shard], workers: int) -> int:
    """Make every shard that is not done, and return how many files were decoded.

    Raises:
        DataError: where one can't be written; says what is kept.
        KeyboardInterrupt: likewise, after Ctrl-C.
    """
    missing = [shard for shard in shards if not shard.is_done()]
    total, wanted = (sum(len(shard.files) for shard in some) for some in (shards, missing))
    paths = [shard.source / file for shard in missing for file in shard.files]
    read = functools.partial(try_read, read_whole, size=shards[0].size)
    images = map_ahead(read, paths, workers, 4 * workers)
    start = total - wanted
    shown = iter(tqdm(images, "Packing", total, initial=start, unit=" images", disable=None))
    try:
        with contextlib.closing(images), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on metadata, without the file's name
            for shard in missing:
                shard.write(itertools.islice(shown, len(shard.files)))
    except (OSError, KeyboardInterrupt) as error:
        done = sum(len(shard.files) for shard in shards if shard.is_done())
        kept = f"{done:,} of {total:,} files are done, the same command goes on from there"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted; {kept}") from error
        why = (error.strerror or str(error)).lower()
        raise DataError(f"{shards[0].root}: {why}; {kept}") from error
    return wanted


def find_images(
    source: Path, val_split: float | None = None
) -> tuple[list[str], dict[str, list[ImageFile]]]:
    """List ``source/train/CLASS/*`` and ``source/val/CLASS/*``, or ``source/CLASS/*``.

    Where the folder has no validation images apart, ``val_split`` of each class's, evenly spaced,
    become them; None is a tenth. Returns the classes, sorted, and the files of each part.

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
    share = 0.0 if val.is_dir() else VAL_SPLIT if val_split is None else val_split
    parts: dict[str, list[ImageFile]] = {"train": [], "val": []}
    for name in classes:
        for i, file in enumerate(_files_of_class(root / name)):
            kept = math.floor((i + 1) * share) > math.floor(i * share)
            parts["val" if kept else "train"].append(file)
    for name in class_folders(val, classes) if val.is_dir() else ():
        parts["val"] += _files_of_class(val / name)
    return classes, {part: files for part, files in parts.items() if files}


def _files_of_class(folder: Path) -> list[ImageFile]:
    files = image_files(folder)
    if not files:
        raise DataError(f"{folder}: no image in it; put some there or remove the folder")
    return files


def _is_whole(root: Path, plan: dict[str, Any]) -> bool:
    """Whether the very set is there, whole; DataError where another one or anything else is."""
    if root.exists() and not root.is_dir():
        raise DataError(f"{root}: not a folder; name a new one")
    if (root / MANIFEST).exists():
        if read_manifest(root)["plan"] != plan:
            raise DataError(f"{root}: {_ANOTHER}")
        shutil.rmtree(root / WORK, ignore_errors=True)  # of a run killed after its last word
        return True
    path = root / WORK / "plan.json"
    if path.exists() and json.loads(path.read_text()) != plan:
        raise DataError(f"{root}: {_ANOTHER}")
    if not path.exists() and root.exists() and {entry.name for entry in root.iterdir()} - {WORK}:
        raise DataError(f"{root}: exists and is not an empty folder; name another one")
    return False


def _shards(source: Path, parts: dict[str, list[str]], root: Path, size: int) -> list[Shard]:
    """The work, cut by the number of images alone: any number of threads makes the same set."""
    total = sum(map(len, parts.values()))
    length = min(_SHARD_IMAGES, max(_LEAST_SHARD_IMAGES, total // _SHARDS))
    return [
        Shard(source, root, part, number, files[start : start + length], size)
        for part, files in parts.items()
        for number, start in enumerate(range(0, len(files), length))
    ]


def _require_space(root: Path, shards: list[Shard]) -> None:
    """Raise DataError where the set and what is on disk while it is made do not fit."""
    pixels = 3 * shards[0].size ** 2
    needed = sum(len(shard.files) * (pixels + 512) + 4 * pixels + 8192 for shard in shards)
    there = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    place = next(path for path in (root, *root.parents) if path.exists())
    free, more = shutil.disk_usage(place).free, needed - there
    if free < more:
        need, have, lack = (f"{count / 1e6:,.1f} MB" for count in (more, free, more - free))
        raise DataError(
            f"{root}: packing needs {need} and {have} are free; free {lack} more or name "
            "another disk"
        )


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    with open(root / WORK / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{root}: another process is packing into it; wait for it") from error
        yield


def _finish(classes: list[str], shards: list[Shard], plan: dict[str, Any]) -> None:
    """Write index, statistics and, last, the manifest."""
    root, moments = shards[0].root, Moments(plan["size"])
    labels = {name: label for label, name in enumerate(classes)}
    records: dict[str, list[Record]] = {}
    counts: dict[str, list[int]] = {}
    for shard in shards:
        some, of_shard = shard.recorded()
        records.setdefault(shard.part, []).extend(some)
        counts.setdefault(shard.part, []).append(of_shard.images)
        if shard.part == "train":
            moments.merge(of_shard)
    index: dict[str, bytes] = {}
    for part, some in records.items():
        packed = [record for record in some if record.checksum is not None]
        if not packed:
            reason = f"{len(some)} can't be: {some[0].remark}"
            raise DataError(f"{shards[0].source}: no {part} image of it can be read ({reason})")
        names = [record.file for record in packed]
        of_class = [labels[PurePosixPath(name).parent.name] for name in names]
        index[f"{part}/labels.npy"] = _npy(of_class, np.int64)
        index[f"{part}/checksums.npy"] = _npy([record.checksum for record in packed], np.uint32)
        index[f"{part}/names.json"] = json.dumps(names).encode()
    mean, covariance = moments.mean_and_covariance()
    remarks = [record for some in records.values() for record in some if record.remark]
    files = {
        "mean.npy": _npy(moments.mean_image(), np.float32),
        ODD: _table([record for record in remarks if record.checksum is not None]),
        LEFT_OUT: _table([record for record in remarks if record.checksum is None]),
        **index,
    }
    for name, data in files.items():
        _save(root / name, data)
    manifest = {
        "format": FORMAT,
        "plan": plan,
        "size": plan["size"],
        "source": str(shards[0].source),
        "classes": classes,
        "parts": {part: {"images": sum(n), "shards": n} for part, n in counts.items()},
        "channel_mean": mean.tolist(),
        "covariance": covariance.tolist(),
        "files": {name: file_digest(root / name) for name in files},
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


def _table(records: list[Record]) -> bytes:
    """A line of file and remark for each record."""
    rows = ((record.file.replace("\\", "\\\\"), record.remark or "") for record in records)
    return "".join("\t".join(map(printable, row)) + "\n" for row in rows).encode()


def _summary(root: Path, decoded: int, seconds: float) -> Packed:
    parts = read_manifest(root)["parts"]
    return Packed({part: about["images"] for part, about in parts.items()}, decoded, seconds)
