"""Makes the folders that docs/fine_tuning.md trains on, of pictures in two Debian packages.

    apt install openclipart-png tuxpaint-stamps-default
    python docs/make_clipart.py OUT

OUT/clipart holds train/CLASS and val/CLASS of drawings, OUT/photos/0 to 4 the five folds of the
photographs. The same packages give the same files: what is left out and which part a picture is in
depend on the SHA-256 of its file, not on chance.
"""

from __future__ import annotations

import sys
from hashlib import sha256
from pathlib import Path

from PIL import Image

CLIPART = Path("/usr/share/openclipart/png")
STAMPS = Path("/usr/share/tuxpaint/stamps")
PHOTOS = {
    "bird": "animals/birds", "fish": "animals/fish", "flower": "plants/flowers",
    "fruit": "food/fruit", "insect": "animals/insects", "instrument": "hobbies/music",
    "mammal": "animals/mammals", "tool": "household/tools", "vegetable": "food/vegetables",
    "vehicle": "vehicles",
}  # fmt: skip
NO_PHOTOS = {"cartoon", "toys", "plastic"}
FOLDS = 5
FEWEST, MOST = 24, 150  # drawings in a class
SIDE = 96
Image.MAX_IMAGE_PIXELS = None  # sizes are looked at before anything is decoded


def usable(path: Path, seen: set[str]) -> bool:
    """Whether a file is a picture of a fair size that is not in ``seen``, where it then is."""
    digest = sha256(path.read_bytes()).hexdigest()
    with Image.open(path) as image:
        short, long = sorted(image.size)
    if path.is_symlink() or digest in seen or short < 32 or long > 4096 or long > 4 * short:
        return False
    seen.add(digest)
    return True


def shuffled(paths: list[Path]) -> list[Path]:
    """In the order of their files' hashes: no chance, and nothing to do with their names."""
    return sorted(paths, key=lambda path: sha256(path.read_bytes()).digest())


def write(path: Path, folder: Path) -> None:
    """On a white square, without transparent borders."""
    with Image.open(path) as image:
        drawing = image.convert("RGBA")
    drawing = drawing.crop(drawing.getbbox())
    side = max(drawing.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    folder.mkdir(parents=True, exist_ok=True)
    smaller = square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    smaller.save(folder / path.name)


def make_clipart(out: Path) -> None:
    """A class is a folder or a folder in one; a tenth of each is kept for validation."""
    seen: set[str] = set()
    classes: dict[str, list[Path]] = {}
    for path in sorted(CLIPART.rglob("*.png")):
        name = "-".join(path.relative_to(CLIPART).parent.parts[:2])
        if name != "unsorted" and usable(path, seen):
            classes.setdefault(name, []).append(path)
    for name, paths in classes.items():
        if len(paths) >= FEWEST:
            for number, path in enumerate(shuffled(paths)[:MOST]):
                write(path, out / ("train" if number % 10 else "val") / name)


def make_photos(out: Path) -> None:
    """Each fold validates on another fifth of each class and trains on the rest."""
    seen: set[str] = set()
    for name, folder in PHOTOS.items():
        paths = [
            path
            for path in sorted((STAMPS / folder).rglob("*.png"))
            if NO_PHOTOS.isdisjoint(path.parts) and not path.stem.endswith("_mirror")
        ]
        for number, path in enumerate(shuffled([path for path in paths if usable(path, seen)])):
            for fold in range(FOLDS):
                part = "val" if number % FOLDS == fold else "train"
                write(path, out / str(fold) / part / name)


if __name__ == "__main__":
    make_clipart(Path(sys.argv[1]) / "clipart")
    make_photos(Path(sys.argv[1]) / "photos")
