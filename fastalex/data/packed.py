"""A packed set: every image decoded once, as arrays on disk.

    packed.json           classes, numbers of images, statistics, checksums; written last
    mean.npy              float32 [S, S, 3], the mean of the training images
    train/00000.npy, ...  uint8 [n, S, S, 3], RGB
    train/labels.npy      int64 [N], indices into the classes
    train/checksums.npy   uint32 [N], CRC-32 of each image's pixels
    train/names.json      where each image came from, below the packed folder
    val/...               likewise
    left_out.tsv, odd.tsv files that could not be read, and remarks on some that could

Without ``packed.json`` a set is not whole, and nothing here opens it. Each image is compared with
its checksum as it is read. Files are read and not mapped: a mapped file that is cut short or whose
disk fails ends the process.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from fastalex.data.base import DataError, Pixels, map_ahead, printable, retrying
from fastalex.data.fingerprint import digest

try:
    from isal.isal_zlib import crc32 as crc32  # many times as fast as zlib's
except ImportError:  # where no one built it
    from zlib import crc32 as crc32

FORMAT = "fastalex-packed-1"
MANIFEST = "packed.json"
WORK = "packing"  # the folder of what an unfinished set needs besides
HEADER = 128  # bytes of a shard's .npy header
MAX_SIZE = 1024  # side in pixels


class PackedImages:
    """The images of one part, "train" or "val", of the packed set ``root``.

    Attributes:
        size: side in pixels at which the images are packed.
        shards: how many images each file of them has.
        covariance: [3, 3], of the channels of the training images, 0 to 255.
        mean_image: float32 [size, size, 3], the mean of the training images (P§2).

    Raises:
        DataError: where the set is unfinished, damaged, or lacks the part; whether each file of
            images is as long as it has to be is left out without ``check_shards``.
    """

    def __init__(self, root: Path, part: str, check_shards: bool = True) -> None:
        manifest = self._manifest = read_manifest(root)
        if part not in manifest["parts"]:
            raise DataError(f"{root}: no {part} images in this packed set; pack it again with some")
        self.classes: list[str] = manifest["classes"]
        self.size: int = manifest["size"]
        self.covariance = np.array(manifest["covariance"])
        self._root, self._part = root, part
        self.shards: list[int] = manifest["parts"][part]["shards"]
        self._starts = [0, *itertools.accumulate(self.shards)]
        self._paths = [str(shard_path(root, part, i)) for i in range(len(self.shards))]
        for number in range(len(self.shards) if check_shards else 0):
            self._check_shard(number)
        self.labels: npt.NDArray[np.int64] = self._array(f"{part}/labels.npy", np.int64)
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise DataError(
                f"{root / part / 'labels.npy'}: expected labels from 0 to {len(self.classes) - 1}, "
                f"got {self.labels.min()} to {self.labels.max()}; pack the set again"
            )
        self._checksums = self._array(f"{part}/checksums.npy", np.uint32)

    def __len__(self) -> int:
        return len(self._checksums)

    def name(self, index: int) -> str:
        """The path of the file that the image was decoded from."""
        return str(Path(self._manifest["source"], self._names[index]))

    def image(self, index: int, size: int) -> Pixels:
        """uint8 [size, size, 3], RGB; resized where it is packed at another size."""
        packed = self._packed(index)
        if size == self.size:
            return packed
        return np.array(Image.fromarray(packed).resize((size, size), Image.Resampling.BILINEAR))

    def whole(self, index: int, size: int) -> Image.Image:
        """RGB, at the packed size, whatever ``size``."""
        return Image.fromarray(self._packed(index))

    def keys(self) -> Iterable[tuple[str, int]]:
        return zip(self._names, self._checksums.tolist(), strict=True)

    @functools.cached_property
    def mean_image(self) -> npt.NDArray[np.float32]:
        return self._array("mean.npy", np.float32, (self.size, self.size, 3))

    def read(self, index: int, out: Pixels) -> Pixels:
        """Read an image at the packed size into ``out``, uint8 [size, size, 3], contiguous."""
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        number = bisect.bisect_right(self._starts, index) - 1
        path, row = self._paths[number], index - self._starts[number]
        try:
            found = retrying(lambda: _read_at(path, HEADER + row * out.nbytes, out))
        except OSError as error:
            raise DataError(f"{path}: can't be read: {(error.strerror or '?').lower()}") from error
        if found < out.nbytes:
            raise DataError(f"{path}: cut short; copy the set or pack it again")
        if crc32(out.data) != self._checksums[index]:
            name = printable(self._names[index])
            raise DataError(
                f"{path}: image {row}, {name}, does not match its checksum; "
                "copy the set or pack it again"
            )
        return out

    def damage(self, number: int) -> list[str]:
        """A line for a shard that is cut short, or for each of its images that has changed."""
        lines = []
        try:
            self._check_shard(number)
            for index in range(self._starts[number], self._starts[number + 1]):
                try:
                    self._packed(index)
                except DataError as error:
                    lines.append(str(error))
        except DataError as error:
            return [str(error)]
        return lines

    def _packed(self, index: int) -> Pixels:
        return self.read(index, np.empty((self.size, self.size, 3), np.uint8))

    @functools.cached_property
    def _names(self) -> list[str]:
        path = _checked(self._root, f"{self._part}/names.json", self._manifest)
        names: list[str] = json.loads(path.read_text(encoding="ascii"))
        return names

    def _array(
        self, name: str, kind: type[np.generic], shape: tuple[int, ...] | None = None
    ) -> npt.NDArray[Any]:
        """An array of the set, one element for each image unless ``shape`` says otherwise."""
        path = _checked(self._root, name, self._manifest)
        try:
            array = np.load(path, mmap_mode="r")  # no more than the file has
        except Exception as error:  # its header is Python, of which numpy evaluates literals
            raise DataError(f"{path}: not an array; pack the set again") from error
        if array.shape != (shape or (sum(self.shards),)) or array.dtype != kind:
            raise DataError(f"{path}: of another type or shape than the set; pack it again")
        return np.array(array)

    def _check_shard(self, number: int) -> None:
        path, count = Path(self._paths[number]), self.shards[number]
        expected = HEADER + count * self.size * self.size * 3
        found = path.stat().st_size if path.is_file() else None
        if found != expected:
            what = "missing" if found is None else f"{found:,} bytes long instead of {expected:,}"
            raise DataError(f"{path}: {what}; copy the set or pack it again")
        with open(path, "rb") as file:
            if file.read(HEADER) != shard_header(count, self.size):
                raise DataError(f"{path}: its header is damaged; copy the set or pack it again")


def _read_at(path: str, place: int, out: Pixels) -> int:
    """Fill ``out`` from a place in a file; returns how many bytes there were."""
    data, found = out.reshape(-1).data, 0
    file = os.open(path, os.O_RDONLY)
    try:
        while found < len(data) and (more := os.preadv(file, [data[found:]], place + found)):
            found += more
    finally:
        os.close(file)
    return found


def is_packed(folder: Path) -> bool:
    """Whether ``folder`` is a packed set or the beginning of one."""
    return (folder / MANIFEST).is_file() or (folder / WORK).is_dir()


def read_manifest(root: Path) -> dict[str, Any]:
    """What ``packed.json`` says; raises DataError where there is none, or it is damaged."""
    path = root / MANIFEST
    if not path.is_file():
        if (root / WORK).is_dir():
            raise DataError(f"{root}: packing is not finished; run the same pack command again")
        raise DataError(f"{root}: not a packed set, it has no {MANIFEST}")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        checksum = manifest.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: damaged, or not a packed set's; pack it again") from error
    if manifest.get("format") != FORMAT:
        raise DataError(f"{path}: expected format {FORMAT!r}, got {manifest.get('format')!r}")
    if checksum != digest(manifest):
        raise DataError(f"{path}: damaged, it does not match its checksum; pack the set again")
    try:
        sound = _is_sound(manifest)
    except (KeyError, TypeError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise DataError(f"{path}: sizes, counts or classes that no set has; pack it again")
    return manifest


def _is_sound(manifest: dict[str, Any]) -> bool:
    """Whether sizes, counts and classes are what ``pack`` writes; a checksum stops no author."""
    classes, size, parts = (manifest[key] for key in ("classes", "size", "parts"))
    counts = [count for part in parts.values() for count in part["shards"]]
    return (
        all(isinstance(name, str) for name in classes)
        and 0 < len(classes) == len(set(classes))
        and set(parts) <= {"train", "val"}
        and all(type(count) is int and 0 <= count < 1 << 40 for count in [*counts, size])
        and 1 <= size <= MAX_SIZE
        and bool(np.isfinite(np.array(manifest["covariance"], np.float64).reshape(3, 3)).all())
        and isinstance(manifest["source"], str)
        and isinstance(manifest["files"], dict)
    )


def verify(root: Path, workers: int) -> tuple[int, list[str]]:
    """How many images a set has, and a line for each image or file that is damaged.

    Raises:
        DataError: where the set is not whole, or its index is damaged.
    """
    manifest = read_manifest(root)
    for name in manifest["files"]:
        _checked(root, name, manifest)
    parts = [PackedImages(root, part, check_shards=False) for part in manifest["parts"]]
    shards = [(images, number) for images in parts for number in range(len(images.shards))]
    found = map_ahead(lambda shard: shard[0].damage(shard[1]), shards, workers, 2 * workers)
    bar = tqdm(found, f"Verifying {root}", len(shards), disable=None, unit="shard")
    return sum(map(len, parts)), [line for lines in bar for line in lines]


def shard_path(root: Path, part: str, number: int) -> Path:
    return root / part / f"{number:05d}.npy"


def shard_header(count: int, size: int) -> bytes:
    """The .npy header of a shard, of the same length for any count."""
    fields = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, {size}, {size}, 3), }}"
    prefix = b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little")
    return prefix + fields.ljust(HEADER - 11).encode() + b"\n"


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checked(root: Path, name: str, manifest: dict[str, Any]) -> Path:
    """The path of a file of the set, which is there and has its checksum."""
    path = root / name
    if not path.is_file():
        raise DataError(f"{path}: missing from the packed set; pack it again")
    if file_digest(path) != manifest["files"].get(name):
        raise DataError(f"{path}: damaged, it does not match its checksum; pack the set again")
    return path
