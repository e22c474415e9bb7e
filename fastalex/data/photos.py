"""A small set of real photographs, cut from pictures that scikit-image ships.

A class is one photograph. A rectangle in it is kept for validation, and training crops are cut from
the rest, so that no pixel is in both. Nothing is downloaded and no crop is enlarged.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastalex.common.command_line import check_output
from fastalex.data.base import DataError

CROPS = (240, 40)  # of each photograph, to train and to validate on
_SMALLEST, _LARGEST = 128, 256  # side of a crop
_QUALITY = 92
Box = tuple[int, int, int, int]  # left, top, right, bottom

# The middle of a picture of 512 x 512, and the four sides around it.
_CENTRE: Box = (166, 166, 346, 346)
_RING: tuple[Box, ...] = (
    (0, 0, 512, 166),
    (0, 346, 512, 512),
    (0, 0, 166, 512),
    (346, 0, 512, 512),
)


class Photo(NamedTuple):
    """A photograph, the parts of it that crops are cut from, and whose it is."""

    name: str
    file: str
    train: tuple[Box, ...]
    val: Box
    credit: str
    source: str


_DOCS = "https://scikit-image.org/docs/stable/api/skimage.data.html"
_FACE = ((0, 0, 512, 180), (0, 360, 512, 512), (0, 0, 190, 512), (370, 0, 512, 512))
# Only pictures whose author or publisher gave them to the public domain, as scikit-image documents
# it. The part kept for validation shows things of which the rest shows some too; the black around
# the retina is left out, for it is no picture of anything.
# fmt: off
PHOTOS = (
    Photo("astronaut", "astronaut.png", _FACE, (190, 180, 370, 360),
          "Eileen Collins, astronaut. NASA, public domain.", "https://flic.kr/p/r9qvLn"),
    Photo("brick", "brick.png", _RING, _CENTRE, "brick wall. CC0Textures, CC0.",
          "https://cc0textures.com/view.php?tex=Bricks25"),
    Photo("camera", "camera.png", ((0, 0, 512, 370),), (0, 370, 512, 512),
          "man with a camera. Lav Varshney, CC0.",
          "https://github.com/scikit-image/scikit-image/issues/3927"),
    Photo("chelsea", "chelsea.png", ((136, 0, 451, 300),), (0, 0, 136, 300),
          "Chelsea the cat. Stefan van der Walt, CC0.", _DOCS),
    Photo("clock", "clock_motion.png", ((0, 0, 213, 300),), (213, 0, 400, 300),
          "wall clock, by a moving camera. Stefan van der Walt, public domain.", _DOCS),
    Photo("coffee", "coffee.png", ((0, 0, 420, 400),), (420, 0, 600, 400),
          "cup of espresso. Rachel Michetti, by courtesy of Pikolo Espresso Bar, CC0.", _DOCS),
    Photo("grass", "grass.png", _RING, _CENTRE, "grass. linolafett, CC0.",
          "https://www.deviantart.com/linolafett/art/Grass-01-434853879"),
    Photo("gravel", "gravel.png", _RING, _CENTRE, "gravel. CC0Textures, CC0.",
          "https://cc0textures.com/view.php?tex=Gravel04"),
    Photo("hubble_deep_field", "hubble_deep_field.jpg", ((0, 0, 680, 872),), (680, 0, 1000, 872),
          "Hubble eXtreme Deep Field. NASA, public domain.",
          "http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/"),
    Photo("retina", "retina.jpg", ((200, 200, 1210, 860),), (200, 860, 1210, 1210),
          "retina of a left eye. Mikael Häggström, CC0.",
          "https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg"),
)
# fmt: on


def write_photos(folder: Path, counts: tuple[int, int] = CROPS) -> int:
    """Write ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg`` to ``folder``, all of it or nothing.

    Beside them stands ``manifest.json``: author and licence of each photograph, and each crop's box
    (left, top, right, bottom) in it. Returns how many crops were written, ``counts`` of each
    photograph to train and to validate on.

    Raises:
        DataError: where ``folder`` is in use, or scikit-image is missing.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError(f"{folder}: exists and is not an empty folder; name another one")
    check_output("DIR", folder.parent, folder=True)
    pictures = _pictures_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        crops = _write_crops(partial, pictures, counts)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return crops


def _pictures_folder() -> Path:
    """Where scikit-image keeps its pictures; it is not imported, so it can't try to download."""
    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise DataError('scikit-image is missing; run: pip install "fastalex[photos]"')
    return Path(found.submodule_search_locations[0]) / "data"


def _write_crops(folder: Path, pictures: Path, counts: tuple[int, int]) -> int:
    crops: list[dict[str, object]] = []
    total = len(PHOTOS) * sum(counts)
    with tqdm(total=total, desc="Cutting photographs", unit="crop", disable=None) as bar:
        for number, photo in enumerate(PHOTOS):
            with Image.open(pictures / photo.file) as image:
                image.load()
            parts = {"train": photo.train, "val": (photo.val,)}
            for index, (part, regions) in enumerate(parts.items()):
                (folder / part / photo.name).mkdir(parents=True)
                random = np.random.default_rng([0, number, index])
                for i, box in enumerate(_boxes(regions, counts[index], random)):
                    file = f"{part}/{photo.name}/{i:04d}.jpg"
                    image.crop(box).save(folder / file, quality=_QUALITY)
                    crops.append({"file": file, "photo": photo.name, "box": box})
                    bar.update()
    manifest = {"photos": [photo._asdict() for photo in PHOTOS], "crops": crops}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return len(crops)


def _boxes(regions: Sequence[Box], count: int, random: np.random.Generator) -> Iterator[Box]:
    """Squares, each anywhere in one of ``regions`` and of any scale, small ones oftener."""
    areas = np.array([(box[2] - box[0]) * (box[3] - box[1]) for box in regions])
    for _ in range(count):
        left, top, right, bottom = regions[random.choice(len(regions), p=areas / areas.sum())]
        largest = min(right - left, bottom - top, _LARGEST)
        side = round(_SMALLEST * (largest / _SMALLEST) ** float(random.random()))
        x = int(random.integers(left, right - side, endpoint=True))
        y = int(random.integers(top, bottom - side, endpoint=True))
        yield x, y, x + side, y + side
