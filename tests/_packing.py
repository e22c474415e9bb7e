"""A folder of generated images to pack, good and bad, and an independent way to decode one."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

UNREADABLE = ("truncated.jpg", "empty.jpg", "text.jpg")
ODD = {  # name, and what the remark on it says
    "one.png": "1 x 1 pixels, enlarged",
    "wide.png": "20000 x 30 pixels, nearly all outside the centre",
    "cmyk.jpg": "CMYK",
    "deep.png": "16 bits a channel, of which 8 are kept",
    "animated.webp": "the first of 3 pictures",
}
BAD = (*UNREADABLE, *ODD)


def picture(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """Random blobs of every scale: neither smooth nor noise."""
    image = Image.new("RGB", (width, height))
    for cells in (3, 9, 40):
        noise = random.integers(0, 256, (cells, cells, 3), np.uint8)
        layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        image = Image.blend(image, layer, 0.5)
    return image


def write_good(path: Path, random: np.random.Generator) -> None:
    """A JPEG, PNG or WebP of some size; some turned by EXIF, grey, or a PNG named .JPEG."""
    width, height = (int(side) for side in random.integers(40, 420, 2))
    image = picture(random, width, height)
    kind = int(random.integers(8))
    if kind == 0:
        image = image.convert("L")
    exif = Image.Exif()
    if kind == 1:
        exif[0x0112] = int(random.integers(2, 9))
    formats = {2: "PNG", 3: "PNG", 4: "WEBP"}
    image.save(path, formats.get(kind, "JPEG"), exif=exif)


def write_bad(folder: Path, number: int, random: np.random.Generator) -> None:
    """One file of each name in ``BAD``, with a number before it."""
    folder.mkdir(parents=True, exist_ok=True)

    def save(image: Image.Image, kind: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    image = picture(random, 90, 70)
    jpeg = save(image, "JPEG")
    levels = random.integers(0, 1 << 16, (60, 60)).astype(np.uint16)
    frames = [picture(random, 64, 48) for _ in range(3)]
    contents: dict[str, Callable[[], bytes]] = {
        "truncated.jpg": lambda: jpeg[: len(jpeg) * 2 // 3],
        "empty.jpg": lambda: b"",
        "text.jpg": lambda: b"no picture, but text\n",
        "one.png": lambda: save(image.crop((0, 0, 1, 1)), "PNG"),
        "wide.png": lambda: save(picture(random, 20_000, 30), "PNG"),
        "cmyk.jpg": lambda: save(image.convert("CMYK"), "JPEG"),
        "deep.png": lambda: save(Image.fromarray(levels), "PNG"),
        "animated.webp": lambda: save(
            frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True
        ),
    }
    for name in BAD:
        (folder / f"bad{number:03d}-{name}").write_bytes(contents[name]())


def write_folder(root: Path, good: int, bad: int, seed: int = 0) -> Path:
    """``good`` readable images and ``bad`` sets of one file of each kind in ``BAD``.

    Two classes; one image in five is for validation.
    """
    random = np.random.default_rng(seed)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
    for i in range(good):
        suffix = ("jpg", "JPEG", "png", "webp")[i % 4]  # whatever the file then holds
        folder = root / ("val" if i % 5 == 0 else "train") / ("cat", "dog")[i % 2]
        write_good(folder / f"{i:05d}.{suffix}", random)
    for i in range(bad):
        write_bad(root / "train" / ("cat", "dog")[i % 2], i, random)
    return root


def oracle(path: Path, size: int) -> npt.NDArray[np.uint8]:
    """P§2 with other means: upright first, the square cut out, then resized.

    The square begins at a whole pixel here, so that pixels may differ where the longer side
    has an odd number more than the shorter.
    """
    image = Image.open(path)
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    image = ImageOps.exif_transpose(image).convert("RGB")
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))
