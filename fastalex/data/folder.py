"""A folder of images, one sub-folder for each class."""

from __future__ import annotations

import functools
import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastalex.data.base import CACHE_BYTES, DataError, ImageCache, Pixels, map_ahead
from fastalex.data.check_cache import CheckCache
from fastalex.data.decode import FORMATS, read_image, read_upright, try_read, why
from fastalex.data.fingerprint import Contents, class_contents, digest

T = TypeVar("T")

SUFFIXES = frozenset(FORMATS)  # compared in lower case
_STATS = 512  # files looked at by one thread before another takes over
_SAVE_SECONDS = 60  # between two times that what was found is kept
_CHECK_SIZE = 64  # side at which a file is decoded only to see whether it can be


class FolderImages:
    """The images ``root/CLASS/*``: classes by name, and the images of each by file name.

    Every file is decoded once to find those that can't be (cut short, empty, no image), which are
    left out; what was found is kept (see ``fastalex.data.check_cache``), so that later only files
    that are new or changed are decoded for it. Images are kept in memory, as far as
    ``cache_bytes`` go, at the size asked for. Hidden files, other types and sub-folders of a
    class are ignored.

    Args:
        root: the folder.
        classes: the names that labels index; None takes the sub-folders' names.
        size: the side that ``image`` will be asked for, if known: the first decoding then serves.
        unreadable: what this attribute was when the same folder was opened before; no file is
            decoded to find out again.
        quiet: show no progress bar. It appears, on stderr, only on a terminal.
        cache_bytes: limit of the memory.

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
        quiet: bool = False,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        found = class_folders(root, classes)
        self.classes = found if classes is None else list(classes)
        self._root = root
        files = [(path, name) for name in found for path in image_files(root / name)]
        self._cache = ImageCache(len(files), cache_bytes)
        self._known: CheckCache | None = None
        if unreadable is None:
            self._known = CheckCache(root)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, on metadata, without the file's name
                self.unreadable = self._check([path for path, _ in files], size, quiet)
        else:
            self.unreadable = [(path, reason) for path, reason in unreadable]
        bad = {path for path, _ in self.unreadable}
        files = [(path, name) for path, name in files if str(path) not in bad]
        self._paths = [path for path, _ in files]
        label = {name: index for index, name in enumerate(self.classes)}
        self.labels = np.array([label[name] for _, name in files], np.int64)
        self._require_images(found)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return str(self._paths[index])

    def image(self, index: int, size: int) -> Pixels:
        """uint8 [size, size, 3], RGB; see ``fastalex.data.decode.read_image``.

        Raises:
            DataError: where a file that could be read before can't be any more.
        """
        image = self._cache.get(index, size)
        if image is None:
            image = self._read(read_image, index, size)
            self._cache.put(index, image)
        return image

    def whole(self, index: int, size: int) -> Image.Image:
        """Every pixel of the file, RGB and upright; decoded anew each time.

        Raises:
            DataError: as ``image``.
        """
        return self._read(lambda path, _: read_upright(path), index, size)

    def contents(self) -> Contents:
        """See ``ImageDataset``; told by the name and the size in bytes of each file."""
        images: dict[str, list[tuple[str, int]]] = {name: [] for name in self.classes}
        for (path, size, _), label in zip(self._files, self.labels.tolist(), strict=True):
            images[self.classes[label]].append((os.path.basename(path), size))
        return class_contents(self.classes, images)

    def recall(self, name: str, measure: Callable[[], Any]) -> Any:
        """What ``measure`` returned when it was last called for these very files, or returns now.

        Args:
            name: of what is measured.
            measure: returns something that JSON can hold.
        """
        if self._known is None:
            return measure()
        values, files = self._known.values, digest(self._files)
        if values.get("files") != files:
            values.clear()
            values["files"] = files
        if name not in values:
            values[name] = measure()
            self._known.save()
        return values[name]

    @functools.cached_property
    def _files(self) -> list[tuple[str, int, int]]:
        """Path below the folder, bytes and time of change of each file."""
        return stat_files(self._paths)

    def _read(self, read: Callable[[Path, int], T], index: int, size: int) -> T:
        result = try_read(read, self._paths[index], size)
        if isinstance(result, str):
            raise DataError(f"{self.name(index)}: can't be read any more: {result}")
        return result

    def _check(self, paths: list[Path], size: int | None, quiet: bool) -> list[tuple[str, str]]:
        """Decode every file not known yet, keep what fits in memory, return what can't be read."""
        known = self._known
        assert known is not None
        verdicts = known.look_up(stat_files(paths))
        new = [
            path for path, verdict in zip(paths, verdicts.values(), strict=True) if verdict is None
        ]
        workers, side = min(16, os.cpu_count() or 1), _CHECK_SIZE if size is None else size
        read = lambda path: try_read(read_image, path, side)  # noqa: E731
        results = map_ahead(read, new, workers, 4 * workers)
        bar = tqdm(results, f"Reading {self._root}", len(new), disable=quiet or None, delay=0.5)
        decoded = iter(bar)
        bad: list[tuple[str, str]] = []
        saved = time.monotonic()
        try:
            for index, (key, verdict) in enumerate(verdicts.items()):
                if verdict is None:
                    result = next(decoded)
                    verdict = verdicts[key] = result if isinstance(result, str) else ""
                    if size is not None and not isinstance(result, str):
                        self._cache.put(index - len(bad), result)
                    if time.monotonic() - saved > _SAVE_SECONDS:
                        known.keep(verdicts)
                        saved = time.monotonic()
                if verdict:
                    bad.append((str(paths[index]), verdict))
        finally:  # Ctrl-C too
            if new:
                known.keep(verdicts)
        return bad

    def _require_images(self, found: list[str]) -> None:
        counts = np.bincount(self.labels, minlength=len(self.classes))
        for name in found:
            if counts[self.classes.index(name)] == 0:
                folder = self._root / name
                prefix = f"{folder}{os.sep}"
                reasons = [reason for path, reason in self.unreadable if path.startswith(prefix)]
                detail = f" ({len(reasons)} can't be: {reasons[0]})" if reasons else ""
                raise DataError(
                    f"{folder}: no image that can be read{detail}; "
                    "put images there or remove the folder"
                )


def class_folders(root: Path, known: list[str] | None = None) -> list[str]:
    """Names of the sub-folders of ``root``, sorted.

    Raises:
        DataError: where there are none, or one is not among the ``known`` classes, if given.
    """
    try:
        with os.scandir(root) as entries:
            names = sorted(
                entry.name for entry in entries if _is_dir(entry) and not entry.name.startswith(".")
            )
    except OSError as error:
        raise DataError(f"{root}: {why(error)}; a folder of class folders is needed") from error
    if not names:
        raise DataError(f"{root}: no class in it; put images in a sub-folder for each class")
    for name in names:
        if known is not None and name not in known:
            raise DataError(
                f"{root}: class {name!r} is missing from the training images; "
                "add some there or remove it here"
            )
    return names


def image_files(folder: Path) -> list[Path]:
    """The files of ``folder`` that are named like images, by name; hidden ones are ignored.

    Links that lead nowhere are among them, for someone to hear of them.

    Raises:
        DataError: where the folder can't be read.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if _is_file(entry)]
    except OSError as error:
        raise DataError(f"{folder}: {why(error)}") from error
    return [
        folder / name
        for name in sorted(names)
        if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")
    ]


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def stat_files(paths: list[Path]) -> list[tuple[str, int, int]]:
    """Of each file class and name, bytes and time of its change; -1 where it is not there."""

    def stat(path: Path) -> tuple[str, int, int]:
        try:
            found = os.stat(path)
        except OSError:
            return f"{path.parent.name}/{path.name}", -1, -1
        return f"{path.parent.name}/{path.name}", found.st_size, found.st_mtime_ns

    # A network's disks answer many questions at a time.
    some = [paths[start : start + _STATS] for start in range(0, len(paths), _STATS)]
    found = map_ahead(lambda paths: [stat(path) for path in paths], some, 16, 64)
    return [one for many in found for one in many]
