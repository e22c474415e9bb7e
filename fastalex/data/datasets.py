"""The images that a run trains and validates on: built in, packed, or a folder's."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastalex.data.augment import PUBLISHED_NOISE, ColorNoise
from fastalex.data.base import CACHE_BYTES, DataError, ImageDataset, decode_size, printable
from fastalex.data.folder import FolderImages, class_folders
from fastalex.data.normalization import MEAN_IMAGES, MeanImage
from fastalex.data.packed import PackedImages, is_packed, read_manifest
from fastalex.data.synthetic import TRAIN_COUNT, VAL_COUNT, Split, SyntheticImages

_NAMED = 10  # unreadable files named before the rest are only counted
_LAYOUT = "images go in train/CLASS and val/CLASS"


def open_datasets(
    data: Path | None,
    seed: int,
    image_size: int | None = None,
    unreadable: Sequence[tuple[str, str]] | None = None,
    quiet: bool = False,
) -> tuple[ImageDataset, ImageDataset]:
    """The training and the validation images: a folder's, a packed set's, or the built-in set.

    Files that can't be read, and classes with nothing to validate on, are named on stderr.

    Args:
        data: a folder with ``train/CLASS/*`` and ``val/CLASS/*``, or a packed set; None is the
            built-in set.
        seed: of the built-in set.
        image_size: the net's, if known; then each file is decoded once instead of twice.
        unreadable: ``[*train.unreadable, *val.unreadable]`` of an earlier opening of the same
            folder, so that several processes agree on what is left out and one alone looks.
        quiet: write nothing to stderr.

    Raises:
        DataError: one line on what is missing from the folder.
    """
    size = None if image_size is None else decode_size(image_size)
    classes = None if data is None or is_packed(data) else _check_layout(data)
    parts: tuple[Split, ...] = ("train", "val")
    train, val = (open_part(data, part, seed, size, classes, unreadable) for part in parts)
    if data is not None and not quiet:
        lines = describe([train, val], size)
        missing = sorted(set(train.classes) - {val.classes[label] for label in set(val.labels)})
        if missing:
            lines.append(
                f"No validation images of {', '.join(missing[:_NAMED])}: {len(missing)} of "
                f"{len(train.classes)} classes are trained but not validated"
            )
        for line in lines:
            print(line, file=sys.stderr)
    return train, val


def open_part(
    data: Path | None,
    part: Split,
    seed: int,
    size: int | None,
    classes: list[str] | None,
    unreadable: Iterable[tuple[str, str]] | None,
) -> ImageDataset:
    """The training or the validation images; see ``open_datasets`` and ``FolderImages``."""
    if data is None:
        return SyntheticImages(part, TRAIN_COUNT if part == "train" else VAL_COUNT, seed)
    if is_packed(data):
        return PackedImages(data, part)
    limit = CACHE_BYTES if part == "train" else CACHE_BYTES // 4
    return FolderImages(data / part, classes, size, unreadable, limit)


def class_names(data: Path | None) -> list[str] | None:
    """The classes, before any image is read; None for a folder without training images."""
    if data is None:
        return SyntheticImages("train", 0).classes
    if is_packed(data):
        return list(read_manifest(data)["classes"])
    return class_folders(data / "train") if (data / "train").is_dir() else None


def describe(datasets: Sequence[ImageDataset], size: int | None) -> list[str]:
    """Lines on files left out, and on images packed at another size than they are asked for."""
    bad = [file for dataset in datasets for file in getattr(dataset, "unreadable", [])]
    lines = [f"{printable(path)}: left out: {reason}" for path, reason in bad[:_NAMED]]
    if bad:
        total = len(bad) + sum(map(len, datasets))
        rest = f", {len(bad) - _NAMED} more than named above" if len(bad) > _NAMED else ""
        lines.append(f"{len(bad)} of {total} images can't be read and are left out{rest}")
    packed = datasets[0]
    if isinstance(packed, PackedImages) and size not in (None, packed.size):
        lines.append(
            f"Images packed at {packed.size} pixels are resized to {size} as they are read"
        )
    return lines


def color_noise(dataset: ImageDataset, kind: str) -> ColorNoise:
    """The colour noise of ``fastalex.data.augment.COLOR_NOISES`` for the images of ``dataset``.

    Raises:
        DataError: for measured noise of images that are not packed.
    """
    if kind == "published":
        return PUBLISHED_NOISE
    if not isinstance(dataset, PackedImages):
        raise DataError(
            "--color-noise measured: the covariance is that of a packed set; pack the images with "
            "`python -m fastalex.data pack`, or leave it out"
        )
    return ColorNoise.measured(dataset.covariance)


def mean_image(dataset: ImageDataset, kind: str, side: int) -> MeanImage | None:
    """The mean of a packed set's training images at ``side`` pixels, if ``kind`` subtracts it.

    Raises:
        DataError: where it is damaged.
    """
    if kind not in MEAN_IMAGES or not isinstance(dataset, PackedImages):
        return None
    return MeanImage.of(dataset.mean_image, side, centred=kind == "mean-centre")


def _check_layout(data: Path) -> list[str]:
    """The classes of a folder; raises what can be told without opening any image."""
    if not data.is_dir():
        what = "not a folder" if data.exists() else "no such folder"
        raise DataError(f"{data}: {what}; {_LAYOUT} of a folder")
    for part in ("train", "val"):
        if not (data / part).is_dir():
            raise DataError(f"{data}: no {part} folder in it; {_LAYOUT}")
    classes = class_folders(data / "train")
    class_folders(data / "val", classes)
    return classes
