"""The image files of a folder that is to be packed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fastalex.data.base import DataError
from fastalex.data.folder import class_folders, image_files, stat_files

VAL_SPLIT = 0.1  # of the images of each class, where there is no folder of validation images


@dataclass(frozen=True)
class Listing:
    """Every image file of a folder, by part.

    Attributes:
        source: the folder.
        classes: sorted names.
        parts: the files of "train" and of "val", if any, as paths below ``source``.
        bytes: the size of each file, in the same order; -1 of a link that leads nowhere.
    """

    source: Path
    classes: list[str]
    parts: dict[str, list[str]]
    bytes: dict[str, list[int]]

    @classmethod
    def read(cls, source: Path, val_split: float | None = None) -> Listing:
        """List ``source/train/CLASS/*`` and ``source/val/CLASS/*``, or ``source/CLASS/*``.

        Args:
            source: the folder.
            val_split: share of each class's images, evenly spaced, that become validation images
                where the folder has none apart; None is a tenth.

        Raises:
            DataError: where the folder is not laid out so, or a class has no image file.
        """
        if val_split is not None and not 0 <= val_split < 1:
            raise DataError(f"--val-split: expected at least 0 and below 1, got {val_split}")
        if not source.is_dir():
            what = "not a folder" if source.exists() else "no such folder"
            raise DataError(f"{source}: {what}; images go in CLASS, or train/CLASS and val/CLASS")
        train, val = source / "train", source / "val"
        if val.is_dir() and not train.is_dir():
            raise DataError(f"{source}: a val folder and no train folder beside it")
        root = train if train.is_dir() else source
        classes = class_folders(root)
        files = {"train": list(_files(root, classes)), "val": []}
        if val.is_dir():
            if val_split is not None:
                raise DataError(f"--val-split {val_split}: {val} has the validation images")
            files["val"] = list(_files(val, class_folders(val, classes)))
        else:
            files = _split(files["train"], VAL_SPLIT if val_split is None else val_split)
        parts = {
            part: [path.relative_to(source).as_posix() for path in files[part]]
            for part in files
            if files[part]
        }
        sizes = {part: [size for _, size, _ in stat_files(files[part])] for part in parts}
        return cls(source, classes, parts, sizes)

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))


def class_of(file: str) -> str:
    """The name of the class that a path of a listing belongs to."""
    return PurePosixPath(file).parent.name


def _files(root: Path, classes: list[str]) -> Iterator[Path]:
    for name in classes:
        files = image_files(root / name)
        if not files:
            raise DataError(f"{root / name}: no image in it; put some there or remove the folder")
        yield from files


def _split(files: list[Path], share: float) -> dict[str, list[Path]]:
    """The files of each class, some of them, evenly spaced, for validation."""
    parts: dict[str, list[Path]] = {"train": [], "val": []}
    position: dict[Path, int] = {}
    for file in files:
        before = position.get(file.parent, 0)
        position[file.parent] = before + 1
        kept = math.floor((before + 1) * share) > math.floor(before * share)
        parts["val" if kept else "train"].append(file)
    return parts
