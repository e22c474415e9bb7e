"""A packed set: every image decoded once, as arrays on disk that are mapped into memory.

    packed.json           classes, numbers of images, statistics, checksums; written last
    mean.npy              float32 [S, S, 3], the mean of the training images
    train/00000.npy, ...  uint8 [n, S, S, 3], RGB
    train/labels.npy      int64 [N], indices into the classes
    train/checksums.npy   uint32 [N], CRC-32 of each image's pixels
    train/names.json      where each image came from, below the packed folder
    val/...               likewise
    left_out.tsv, odd.tsv files that could not be read, and remarks on some that could

Without ``packed.json`` a set is not whole, and nothing here opens it.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from fastalex.data.background import map_ahead
from fastalex.data.base import DataError, Pixels
from fastalex.data.fingerprint import Contents, class_contents, digest, fingerprint

FORMAT = "fastalex-packed-1"
MANIFEST = "packed.json"
WORK = "packing"  # the folder of an unfinished set's journals
HEADER = 128  # bytes of a shard's .npy header
INDEX = ("labels.npy", "checksums.npy", "names.json")


class PackedImages:
    """The images of one part of a packed set; ``image`` reads them from the mapped file.

    Args:
        root: the packed set.
        part: "train" or "val".

    Attributes:
        size: side in pixels at which the images are packed.
        channel_mean: [3], of the pixels of the training images, 0 to 255.
        covariance: [3, 3], of their channels.
        mean_image: float32 [size, size, 3], the mean of the training images (P§2).

    Raises:
        DataError: where the set is unfinished, damaged, or lacks the part.
    """

    def __init__(self, root: Path, part: str) -> None:
        manifest = self._manifest = read_manifest(root)
        if part not in manifest["parts"]:
            raise DataError(f"{root}: no {part} images in this packed set; pack it again with some")
        self.classes: list[str] = manifest["classes"]
        self.size: int = manifest["size"]
        self.unreadable: list[tuple[str, str]] = []  # left out when the set was packed
        self.channel_mean = np.array(manifest["channel_mean"])
        self.covariance = np.array(manifest["covariance"])
        self._root, self._part = root, part
        counts = manifest["parts"][part]["shards"]
        for number, count in enumerate(counts):
            _check_shard(shard_path(root, part, number), count, self.size)
        self._starts = [0, *itertools.accumulate(counts)]
        self._maps: list[Pixels | None] = [None] * len(counts)
        _check_file(root, f"{part}/labels.npy", manifest)
        self.labels: npt.NDArray[np.int64] = np.load(root / part / "labels.npy")

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The path of the file that the image was decoded from."""
        return str(Path(self._manifest["source"], self._names[index]))

    def image(self, index: int, size: int) -> Pixels:
        """uint8 [size, size, 3], RGB: read-only and not copied at the packed size, else resized."""
        packed = self._packed(index)
        if size == self.size:
            return packed
        return np.array(Image.fromarray(packed).resize((size, size), Image.Resampling.BILINEAR))

    def whole(self, index: int, size: int) -> Image.Image:
        """RGB, at the packed size, whatever ``size``."""
        return Image.fromarray(self._packed(index))

    def contents(self) -> Contents:
        """See ``ImageSource``; told by the checksums of the pixels and the names of their files."""
        _check_file(self._root, f"{self._part}/checksums.npy", self._manifest)
        checksums = np.load(self._root / self._part / "checksums.npy")
        images: dict[str, list[tuple[str, int]]] = {name: [] for name in self.classes}
        for name, label, checksum in zip(
            self._names, self.labels.tolist(), checksums.tolist(), strict=True
        ):
            images[self.classes[label]].append((name, checksum))
        return class_contents(self.classes, images)

    def fingerprint(self) -> str:
        return fingerprint(self.contents())

    @functools.cached_property
    def mean_image(self) -> npt.NDArray[np.float32]:
        _check_file(self._root, "mean.npy", self._manifest)
        mean: npt.NDArray[np.float32] = np.load(self._root / "mean.npy")
        return mean

    def _packed(self, index: int) -> Pixels:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        number = bisect.bisect_right(self._starts, index) - 1
        pixels = self._maps[number]
        if pixels is None:
            path = shard_path(self._root, self._part, number)
            pixels = self._maps[number] = np.asarray(np.load(path, mmap_mode="r"))
        image: Pixels = pixels[index - self._starts[number]]
        return image

    @functools.cached_property
    def _names(self) -> list[str]:
        path = self._root / self._part / "names.json"
        names: list[str] = json.loads(path.read_text(encoding="ascii"))
        return names


def is_packed(folder: Path) -> bool:
    """Whether ``folder`` is a packed set or the beginning of one."""
    return (folder / MANIFEST).is_file() or (folder / WORK).is_dir()


def read_manifest(root: Path) -> dict[str, Any]:
    """What ``packed.json`` says.

    Raises:
        DataError: where there is none, or it is damaged.
    """
    path = root / MANIFEST
    if not path.is_file():
        if (root / WORK).is_dir():
            raise DataError(f"{root}: packing is not finished; run the same pack command again")
        raise DataError(f"{root}: not a packed set, it has no {MANIFEST}")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        checksum = manifest.pop("sha256")
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: damaged, or not a packed set's; pack it again") from error
    if manifest.get("format") != FORMAT:
        raise DataError(f"{path}: expected format {FORMAT!r}, got {manifest.get('format')!r}")
    if checksum != digest(manifest):
        raise DataError(f"{path}: damaged, it does not match its checksum; pack the set again")
    return manifest


def verify(root: Path, workers: int, quiet: bool = False) -> tuple[int, list[str]]:
    """Read the whole set and compare it with its checksums.

    Returns:
        How many images were compared, and what is damaged: a line for each image or file.

    Raises:
        DataError: where the set is not whole, or its index is damaged.
    """
    manifest = read_manifest(root)
    for name in manifest["files"]:
        _check_file(root, name, manifest)
    shards = list(_shards(root, manifest))
    damaged: list[str] = []
    checked = map_ahead(_damages, shards, workers, 2 * workers)
    total = sum(len(shard.checksums) for shard in shards)
    with tqdm(desc=f"Verifying {root}", total=total, disable=quiet or None, unit="image") as bar:
        for shard, lines in zip(shards, checked, strict=True):
            damaged += lines
            bar.update(len(shard.checksums))
    return total, damaged


def shard_path(root: Path, part: str, number: int) -> Path:
    return root / part / f"{number:05d}.npy"


def shard_header(count: int, size: int) -> bytes:
    """The .npy header of a shard, of the same length for any count."""
    fields = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, {size}, {size}, 3), }}"
    prefix = b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little")
    return prefix + fields.ljust(HEADER - 11).encode() + b"\n"


def file_digest(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def _check_file(root: Path, name: str, manifest: dict[str, Any]) -> None:
    path = root / name
    if not path.is_file():
        raise DataError(f"{path}: missing from the packed set; pack it again")
    if file_digest(path) != manifest["files"][name]:
        raise DataError(f"{path}: damaged, it does not match its checksum; pack the set again")


def _check_shard(path: Path, count: int, size: int) -> None:
    expected = HEADER + count * size * size * 3
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        what = "missing" if found is None else f"{found:,} bytes long instead of {expected:,}"
        raise DataError(f"{path}: {what}; copy the set or pack it again")


class _Shard(NamedTuple):
    path: Path
    size: int
    names: list[str]
    checksums: npt.NDArray[np.uint32]


def _shards(root: Path, manifest: dict[str, Any]) -> Iterator[_Shard]:
    for part, about in manifest["parts"].items():
        names = json.loads((root / part / "names.json").read_text(encoding="ascii"))
        checksums = np.load(root / part / "checksums.npy")
        start = 0
        for number, count in enumerate(about["shards"]):
            rows = slice(start, start + count)
            path = shard_path(root, part, number)
            yield _Shard(path, manifest["size"], names[rows], checksums[rows])
            start += count


def _damages(shard: _Shard) -> list[str]:
    """A line for each image of a shard that does not match its checksum."""
    try:
        _check_shard(shard.path, len(shard.names), shard.size)
    except DataError as error:
        return [str(error)]
    shape = (len(shard.names), shard.size, shard.size, 3)
    if not shard.names:
        return []
    pixels = np.memmap(shard.path, np.uint8, "r", HEADER, shape)
    return [
        f"{shard.path}: image {row}, {name}, does not match its checksum"
        for row, (name, checksum) in enumerate(zip(shard.names, shard.checksums, strict=True))
        if zlib.crc32(pixels[row]) != checksum
    ]
