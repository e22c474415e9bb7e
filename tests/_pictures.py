"""Pictures and image files for tests."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image


def smooth(width: int, height: int) -> npt.NDArray[np.uint8]:
    """A picture without sharp edges, so that JPEG and resizing hardly change it."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    channels = [40 + 170 * x, 30 + 190 * y, 220 - 180 * x * y]
    return np.stack(channels, -1).round().astype(np.uint8)


def save(path: Path, pixels: npt.NDArray[np.generic] | Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


_PNGS = {"RGB": (8, 2, 3), "RGBA": (8, 6, 4), "grey16": (16, 0, 1), "palette": (8, 3, 1)}


def write_png(
    path: Path, width: int, height: int, kind: str = "RGB", rows: int | None = None
) -> Path:
    """A PNG of one colour, compressed row by row, with ``rows`` of the height that it claims."""
    bits, colours, channels = _PNGS[kind]

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    row = b"\0" + bytes(width * channels * bits // 8)
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(row) for _ in range(rows or height)) + packer.flush()
    body = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))
    body += chunk(b"PLTE", bytes(range(6))) if kind == "palette" else b""
    body += chunk(b"IDAT", data) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path
