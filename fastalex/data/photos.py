"""A small set of real photographs, cut from pictures that scikit-image ships.

A class is one photograph. Each is divided by a straight line: validation crops come from one side
of it and training crops from the other, so that no pixel is in both. Nothing is downloaded and no
crop is enlarged.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastalex.data.base import DataError

TRAIN_CROPS = 240
VAL_CROPS = 40
VAL_FRACTION = 0.3
_SMALLEST, _LARGEST = 128, 256  # side of a crop
_QUALITY = 92
MANIFEST = "manifest.json"
README = "README.txt"

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Photo:
    """A photograph, where it is from, and the side of it that is kept for validation."""

    name: str
    file: str
    val_side: Literal["left", "right", "bottom"]
    what: str
    author: str
    licence: str
    source: str


# Only pictures whose author or publisher gave them to the public domain, as scikit-image documents
# it. The side is one that shows some of what the rest shows.
PHOTOS = (
    Photo(
        "astronaut",
        "astronaut.png",
        "bottom",
        "Eileen Collins, astronaut",
        "NASA",
        "public domain",
        "https://flic.kr/p/r9qvLn",
    ),
    Photo(
        "brick",
        "brick.png",
        "right",
        "brick wall",
        "CC0Textures",
        "CC0",
        "https://cc0textures.com/view.php?tex=Bricks25",
    ),
    Photo(
        "camera",
        "camera.png",
        "bottom",
        "man with a camera",
        "Lav Varshney",
        "CC0",
        "https://github.com/scikit-image/scikit-image/issues/3927",
    ),
    Photo(
        "chelsea",
        "chelsea.png",
        "left",
        "Chelsea the cat",
        "Stefan van der Walt",
        "CC0",
        "https://scikit-image.org/docs/stable/api/skimage.data.html",
    ),
    Photo(
        "clock",
        "clock_motion.png",
        "bottom",
        "wall clock, by a moving camera",
        "Stefan van der Walt",
        "public domain",
        "https://scikit-image.org/docs/stable/api/skimage.data.html",
    ),
    Photo(
        "coffee",
        "coffee.png",
        "bottom",
        "cup of espresso",
        "Rachel Michetti, by courtesy of Pikolo Espresso Bar",
        "CC0",
        "https://scikit-image.org/docs/stable/api/skimage.data.html",
    ),
    Photo(
        "grass",
        "grass.png",
        "right",
        "grass",
        "linolafett",
        "CC0",
        "https://www.deviantart.com/linolafett/art/Grass-01-434853879",
    ),
    Photo(
        "gravel",
        "gravel.png",
        "right",
        "gravel",
        "CC0Textures",
        "CC0",
        "https://cc0textures.com/view.php?tex=Gravel04",
    ),
    Photo(
        "hubble_deep_field",
        "hubble_deep_field.jpg",
        "right",
        "Hubble eXtreme Deep Field",
        "NASA",
        "public domain",
        "http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/",
    ),
    Photo(
        "retina",
        "retina.jpg",
        "bottom",
        "retina of a left eye",
        "Mikael Häggström",
        "CC0",
        "https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg",
    ),
)


def write_photos(
    folder: Path,
    seed: int = 0,
    train_crops: int = TRAIN_CROPS,
    val_crops: int = VAL_CROPS,
    val_fraction: float = VAL_FRACTION,
) -> int:
    """Write ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg`` to ``folder``, all of it or nothing.

    Beside them stand ``manifest.json``, each crop's box in its photograph, and ``README.txt``,
    the authors and licences.

    Args:
        folder: made here; may exist if it is empty.
        seed: decides the crops; not negative.
        train_crops: of each photograph, at least 1.
        val_crops: likewise.
        val_fraction: share of each photograph's width or height that validation crops come from,
            0.1 to 0.5, and never less than the smallest crop.

    Returns:
        How many crops were written.

    Raises:
        ValueError: for an argument out of its range.
        DataError: where ``folder`` is in use, or scikit-image or one of its pictures is missing.
    """
    for name, value, least in (
        ("seed", seed, 0),
        ("train_crops", train_crops, 1),
        ("val_crops", val_crops, 1),
    ):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if not 0.1 <= val_fraction <= 0.5:
        raise ValueError(f"val_fraction: expected 0.1 to 0.5, got {val_fraction}")
    folder = folder.resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError(f"{folder}: exists and is not an empty folder; name another one")
    pictures = _pictures_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        crops = _write_crops(partial, pictures, seed, (train_crops, val_crops), val_fraction)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return crops


def regions(size: tuple[int, int], side: str, fraction: float) -> tuple[Box, Box]:
    """The training and the validation part of a photograph of ``size`` (width, height)."""
    width, height = size
    depth = max(_SMALLEST, round((height if side == "bottom" else width) * fraction))
    if side == "bottom":
        return (0, 0, width, height - depth), (0, height - depth, width, height)
    if side == "right":
        return (0, 0, width - depth, height), (width - depth, 0, width, height)
    return (depth, 0, width, height), (0, 0, depth, height)


def _pictures_folder() -> Path:
    """Where scikit-image keeps its pictures; it is not imported, so it can't try to download."""
    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise DataError('scikit-image is missing; run: pip install "fastalex[photos]"')
    folder = Path(found.submodule_search_locations[0]) / "data"
    missing = [photo.file for photo in PHOTOS if not (folder / photo.file).is_file()]
    if missing:
        raise DataError(
            f"{folder}: {missing[0]} is missing; "
            'run: pip install --force-reinstall "scikit-image>=0.22"'
        )
    return folder


def _write_crops(
    folder: Path, pictures: Path, seed: int, counts: tuple[int, int], fraction: float
) -> int:
    crops: list[dict[str, object]] = []
    parts: dict[str, dict[str, Box]] = {}
    total = len(PHOTOS) * sum(counts)
    with tqdm(total=total, desc="Cutting photographs", unit="crop", disable=None) as bar:
        for number, photo in enumerate(PHOTOS):
            with Image.open(pictures / photo.file) as image:
                image.load()
            train, val = regions(image.size, photo.val_side, fraction)
            parts[photo.name] = {"train": train, "val": val}
            for index, (part, region) in enumerate((("train", train), ("val", val))):
                (folder / part / photo.name).mkdir(parents=True)
                random = np.random.default_rng([seed, number, index])
                for i, box in enumerate(_boxes(region, counts[index], random)):
                    file = f"{part}/{photo.name}/{i:04d}.jpg"
                    image.crop(box).save(folder / file, quality=_QUALITY)
                    crops.append({"file": file, "photo": photo.name, "box": box})
                    bar.update()
    photos = [{**asdict(photo), "regions": parts[photo.name]} for photo in PHOTOS]
    manifest = {"seed": seed, "photos": photos, "crops": crops}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    (folder / README).write_text(_readme(), encoding="utf-8")
    return len(crops)


def _boxes(region: Box, count: int, random: np.random.Generator) -> Iterator[Box]:
    """Squares in ``region``, anywhere and of any scale from the smallest, small ones oftener."""
    left, top, right, bottom = region
    largest = min(right - left, bottom - top, _LARGEST)
    for _ in range(count):
        side = round(_SMALLEST * (largest / _SMALLEST) ** float(random.random()))
        x = int(random.integers(left, right - side, endpoint=True))
        y = int(random.integers(top, bottom - side, endpoint=True))
        yield x, y, x + side, y + side


def _readme() -> str:
    lines = [
        "Crops of photographs, for training and validating an image classifier.",
        "A class is one photograph; its training and validation crops share no pixel.",
        f"{MANIFEST} has the box (left, top, right, bottom) of each crop.",
        "",
        "The photographs are those that scikit-image ships in its package. Each was given to the",
        "public domain by its author or publisher, as scikit-image documents:",
        "",
    ]
    for photo in PHOTOS:
        lines += [f"{photo.name}: {photo.what}. {photo.author}, {photo.licence}.", photo.source]
    return "\n".join(lines) + "\n"
