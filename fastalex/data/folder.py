"""A folder of images, one sub-folder for each class."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

from fastalex.common.files import replacing
from fastalex.data.base import CACHE_BYTES, DataError, ImageCache, Pixels, map_ahead
from fastalex.data.decode import FORMATS, PASSING, read_image, read_upright, try_read, why

T = TypeVar("T")

CHECKED = ".fastalex-check.json"
_FORMAT = f"fastalex-check-3, Pillow {PIL.__version__}"  # another decoder may read other files
_CHECK_SIZE = 64  # side at which a file is decoded only to see whether it can be


class FolderImages:
    """The images ``root/CLASS/*``: classes by name, and the images of each by file name.

    Every file is decoded once to find those that can't be (cut short, empty, no image), which are
    left out; later only files that are new or changed are decoded for it. Images are kept in memory
    at the size asked for, as far as ``cache_bytes`` go. Hidden files, other types and sub-folders
    of a class are ignored.

    Args:
        classes: the names that labels index; None takes the sub-folders' names.
        size: the side that ``image`` will be asked for, if known: the first decoding then serves.
        unreadable: what this attribute was when the folder was opened before, with or without
            files of other folders; no file is decoded to find out again.

    Attributes:
        unreadable: (path, reason) of each file left out.

    Raises:
        DataError: where ``root`` is no folder, holds no class or one that ``classes`` lacks, or a
            class holds no image that can be read.
    """

    def __init__(
        self,
        root: Path,
        classes: list[str] | None = None,
        size: int | None = None,
        unreadable: Iterable[tuple[str, str]] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        found = class_folders(root, classes)
        self.classes = found if classes is None else list(classes)
        self._cache = ImageCache(cache_bytes)
        files = [file for name in found for file in image_files(root / name)]
        if unreadable is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, on metadata, without the file's name
                unreadable = self._check(root, files, size)
        here = f"{root}{os.sep}"
        self.unreadable = [(file, why) for file, why in unreadable if file.startswith(here)]
        bad = {path for path, _ in self.unreadable}
        self._files = [file for file in files if str(file.path) not in bad]
        number = {name: index for index, name in enumerate(self.classes)}
        of_class = [file.path.parent.name for file in self._files]
        self.labels = np.array([number[name] for name in of_class], np.int64)
        for name in set(found) - set(of_class):
            reasons = [why for file, why in self.unreadable if Path(file).parent == root / name]
            detail = f" ({len(reasons)} can't be: {reasons[0]})" if reasons else ""
            raise DataError(
                f"{root / name}: no image that can be read{detail}; "
                "put images there or remove the folder"
            )

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return str(self._files[index].path)

    def image(self, index: int, size: int) -> Pixels:
        """uint8 [size, size, 3], RGB, by ``read_image``; DataError where it can't be any more."""
        path = self._files[index].path
        image = self._cache.get(path, size)
        if image is None:
            image = _read(read_image, path, size)
            self._cache.put(path, image)
        return image

    def whole(self, index: int, size: int) -> Image.Image:
        """Every pixel of the file, RGB and upright; decoded anew each time."""
        return _read(lambda path, _: read_upright(path), self._files[index].path, size)

    def keys(self) -> list[tuple[str, int]]:
        return [(file.path.name, file.size) for file in self._files]

    def _check(self, root: Path, files: list[ImageFile], size: int | None) -> list[tuple[str, str]]:
        """Decode every file not known yet, keep what fits in memory, return what can't be read.

        A file is known by its path below the folder, its size and its time of change.
        """
        keys, kept = {file.path: _key(file) for file in files}, _recall(root)
        known = {key: kept[key] for key in keys.values() if key in kept}
        new = [path for path, key in keys.items() if key not in known]
        workers = min(16, os.cpu_count() or 1)
        read = functools.partial(try_read, read_image, size=_CHECK_SIZE if size is None else size)
        results = map_ahead(read, new, workers, 4 * workers)
        bar = tqdm(results, f"Reading {root}", len(new), disable=None, delay=0.5)
        try:
            for path, result in zip(new, bar, strict=True):
                known[keys[path]] = result if isinstance(result, str) else ""
                if size is not None and not isinstance(result, str):
                    self._cache.put(path, result)
        finally:  # Ctrl-C too
            if new:
                _keep(root, known)
        return [(str(path), known[key]) for path, key in keys.items() if known[key]]


def _read(read: Callable[[Path, int], T], path: Path, size: int) -> T:
    result = try_read(read, path, size)
    if isinstance(result, str):
        raise DataError(f"{path}: can't be read any more: {result}")
    return result


def _places(root: Path) -> list[Path]:
    """Where it is kept which files of a folder can be read: in it or, if it takes no file, here."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:16]
    return [root / CHECKED, cache / "fastalex" / f"check-{name}.json"]


def _recall(root: Path) -> dict[str, str]:
    """By a key of each file that was looked at, why it can't be read; empty where it can.

    A damaged file, or another version's, only costs the time of a check.
    """
    reasons: dict[str, str] = {}
    for place in _places(root):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            known = json.loads(place.read_text(encoding="utf-8"))
            if known["format"] == _FORMAT:
                reasons |= {str(key): str(why) for key, why in known["files"].items()}
    return reasons


def _keep(root: Path, reasons: Mapping[str, str]) -> None:
    """Write what is known of these files, and of no others, to the first place that takes it.

    What may be another day's is not kept: that a file was not there, or memory short.
    """
    lasting = {key: why for key, why in reasons.items() if why not in PASSING}
    for place in _places(root):
        with contextlib.suppress(OSError):
            if place.name != CHECKED:
                place.parent.mkdir(parents=True, exist_ok=True)
            with replacing(place) as temporary:
                known = {"format": _FORMAT, "files": lasting}
                temporary.write_text(json.dumps(known), encoding="utf-8")
            return


def _key(file: ImageFile) -> str:
    name = f"{file.path.parent.name}/{file.path.name}"
    text = f"{name}\0{file.size}\0{file.changed}".encode(errors="surrogateescape")
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def class_folders(root: Path, known: list[str] | None = None) -> list[str]:
    """Names of the sub-folders of ``root``, sorted; of no class that is not ``known``, if given."""
    try:
        with os.scandir(root) as entries:
            names = sorted(
                entry.name
                for entry in entries
                if os.path.isdir(entry) and not entry.name.startswith(".")
            )
    except OSError as error:
        raise DataError(f"{root}: {why(error)}; a folder of class folders is needed") from error
    if not names:
        raise DataError(f"{root}: no class in it; put images in a sub-folder for each class")
    for name in names:
        if known is not None and name not in known:
            raise DataError(
                f"{root}: class {name!r} is none of the classes trained on; "
                "add training images of it or remove it here"
            )
    return names


class ImageFile(NamedTuple):
    """A file that is named like an image, its bytes and its time of change; -1 of a dead link."""

    path: Path
    size: int
    changed: int


def image_files(folder: Path) -> list[ImageFile]:
    """The files of ``folder`` that are named like images, by name; hidden ones are ignored.

    Links that lead nowhere are among them, for someone to hear of them.
    """
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if _is_image(entry)]
    except OSError as error:
        raise DataError(f"{folder}: {why(error)}") from error
    files = []
    for entry in sorted(found, key=lambda entry: entry.name):
        size, changed = -1, -1
        with contextlib.suppress(OSError):
            size, changed = entry.stat().st_size, entry.stat().st_mtime_ns
        files.append(ImageFile(folder / entry.name, size, changed))
    return files


def _is_image(entry: os.DirEntry[str]) -> bool:
    named = os.path.splitext(entry.name)[1].lower() in FORMATS and not entry.name.startswith(".")
    return named and (entry.is_file(follow_symlinks=False) or entry.is_symlink())
