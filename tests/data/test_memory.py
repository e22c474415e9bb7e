"""One image file takes a bounded amount of memory, starts no program and reaches few decoders."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastalex.data.decode import read_image, read_upright, read_whole, try_read

MOST = 400  # MB above what the process had before
_MEASURE = """
import json, sys, warnings
from pathlib import Path
from PIL import Image
from fastalex.data.decode import read_image, read_upright, read_whole, try_read
warnings.simplefilter("ignore")
Image.init()
Image.new("RGB", (500, 500)).resize((64, 64))

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1000

before = memory("VmRSS")
results = []
for path in map(Path, sys.argv[1:]):
    for read in (read_whole, read_image, lambda path, size: read_upright(path)):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        result = try_read(read, path, 256)
        results.append([memory("VmHWM") - before, result if isinstance(result, str) else None])
        del result
print(json.dumps(results))
"""


def measure(*paths: Path) -> list[tuple[float, str | None]]:
    """Of three ways to read each file: the peak in MB above the start, and why it was refused."""
    command = [sys.executable, "-c", _MEASURE, *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return [(peak, reason) for peak, reason in json.loads(run.stdout)]


def write_png(
    path: Path, width: int, bits: int, kind: int, channels: int, height: int | None = None
) -> Path:
    """A PNG of one colour, square unless ``height`` is given, compressed row by row."""
    height = height or width

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    row = b"\0" + bytes(width * channels * bits // 8)
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    colours = chunk(b"PLTE", bytes(range(6))) if kind == 3 else b""
    body = header + colours + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


PNGS = {"RGB": (8, 2, 3), "RGBA": (8, 6, 4), "grey16": (16, 0, 1), "palette": (8, 3, 1)}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind != "RGB" else kind for kind in PNGS]
)
def test_a_small_file_of_many_pixels_is_refused_before_it_takes_memory(
    tmp_path: Path, kind: str
) -> None:
    path = write_png(tmp_path / "bomb.png", 13_300, *PNGS[kind])  # below Pillow's own limit
    assert path.stat().st_size < 4_000_000
    for peak, reason in measure(path):
        assert reason is not None
        assert reason.startswith("176,890,000 pixels take ")
        assert peak < 30


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(89_000_000, 1), (1, 30_000_000)], ids=["wide", "tall"])
def test_a_picture_of_one_row_or_one_column_is_refused_for_its_rows(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    """A decoder keeps two rows, and Pillow a pointer to each."""
    path = write_png(tmp_path / "thin.png", shape[0], *PNGS["RGB"], height=shape[1])
    for peak, reason in measure(path):
        assert reason is not None
        assert "to decode, more than" in reason
        assert peak < 30


@pytest.mark.slow
def test_cmyk_too(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jpg"
    Image.new("CMYK", (9_000, 9_000)).save(path)
    whole, image, upright = measure(path)
    assert whole[1] is not None
    assert whole[0] < 30
    # A JPEG decoder can reduce it first.
    for peak, reason in (image, upright):
        assert reason is None
        assert peak < MOST


def photograph(side: int, mode: str) -> Image.Image:
    """Blurred noise: what compresses as photographs do costs the decoders what they cost."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    return Image.fromarray(noise).resize((side, side)).convert(mode)


LARGEST: dict[str, Callable[[Path], object]] = {
    "rgb.png": lambda path: write_png(path, 9_400, *PNGS["RGB"]),
    "rgba.png": lambda path: write_png(path, 6_690, *PNGS["RGBA"]),
    "grey16.png": lambda path: write_png(path, 7_700, *PNGS["grey16"]),
    "palette.png": lambda path: write_png(path, 8_400, *PNGS["palette"]),
    "cmyk.jpg": lambda path: photograph(6_600, "CMYK").save(path),
    "progressive.jpg": lambda path: photograph(5_900, "RGB").save(
        path, progressive=True, subsampling=0
    ),
    "lossy.webp": lambda path: photograph(4_700, "RGB").save(path, method=0),
    "one strip.tif": lambda path: photograph(5_400, "RGB").save(
        path, compression="tiff_deflate", tiffinfo={278: 5_400}
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_images_that_are_read_stay_below_the_limit(tmp_path: Path, name: str) -> None:
    LARGEST[name](tmp_path / name)
    for peak, reason in measure(tmp_path / name):
        assert reason is None
        assert peak < MOST


@pytest.mark.slow
def test_a_tile_larger_than_its_image_counts(tmp_path: Path) -> None:
    """TIFF decodes a whole tile at once, whatever part of it the image shows."""
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(64, 12_000, zlib.compress(bytes(12_000 * 12_000 * 3), 1)))
    for peak, reason in measure(path):
        assert reason is not None
        assert "to decode, more than" in reason
        assert peak < 30


def tiff(side: int, tile_side: int, data: bytes) -> bytes:
    """An RGB TIFF of one deflated tile."""
    entries = {256: side, 257: side, 258: 8, 259: 8, 262: 2, 277: 3, 322: tile_side, 323: tile_side}
    at = 8 + 2 + 12 * (len(entries) + 2) + 4
    entries |= {324: at, 325: len(data)}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + fields + bytes(4) + data


def test_a_long_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "long.webp"
    Image.new("RGB", (64, 64)).save(path)
    with open(path, "r+b") as file:
        file.truncate(2_000_000_000)
    for peak, reason in measure(path):
        assert reason == "2,000 MB, more than the 120 MB allowed"
        assert peak < 30


# Which decoders a file reaches


def test_no_file_starts_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (64, 64)).save(path, "EPS")
    program, called = tmp_path / "gs", tmp_path / "called"
    program.write_text(f"#!/bin/sh\ntouch {called}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for read in (read_whole, read_image, lambda path, size: read_upright(path)):
        assert try_read(read, path, 64) == "not an image"
    assert not called.exists()


@pytest.mark.parametrize("kind", ["EPS", "TGA", "PCX", "ICO", "ICNS", "SGI", "JPEG2000", "DDS"])
def test_other_kinds_are_no_images_whatever_their_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.jpg"
    try:
        Image.new("RGB", (64, 64)).save(path, kind)
    except (OSError, KeyError) as error:
        pytest.skip(f"this Pillow can't write {kind}: {error}")
    for read in (read_image, read_whole):
        assert try_read(read, path, 64) == "not an image"


def test_photoshop_and_fits_files_too(tmp_path: Path) -> None:
    psd = b"8BPS" + struct.pack(">H6xHIIHHIII", 1, 3, 4, 4, 8, 3, 0, 0, 0) + bytes(2 + 48)
    (tmp_path / "a.jpg").write_bytes(psd)
    assert Image.open(tmp_path / "a.jpg").format == "PSD"
    assert try_read(read_image, tmp_path / "a.jpg", 64) == "not an image"
    cards = ["SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 2", "NAXIS1  = 4", "NAXIS2  = 4", "END"]
    fits = "".join(card.ljust(80) for card in cards).ljust(2880).encode() + bytes(2880)
    (tmp_path / "b.jpg").write_bytes(fits)
    assert Image.open(tmp_path / "b.jpg").format == "FITS"
    assert try_read(read_whole, tmp_path / "b.jpg", 64) == "not an image"


# What is read is as before


def test_large_pictures_are_converted_in_strips_alike(tmp_path: Path) -> None:
    """Against the conversion of the whole, which is a function of each pixel alone."""
    random = np.random.default_rng(0)
    values = random.integers(0, 256, (700, 900, 4), np.uint8)
    rgba = Image.fromarray(values)
    rgba.save(tmp_path / "a.png")
    white = Image.new("RGBA", rgba.size, "white")
    expected = Image.alpha_composite(white, rgba).convert("RGB")
    expected.save(tmp_path / "b.png")
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.png", 256), read_image(tmp_path / "b.png", 256)
    )
    levels = random.integers(0, 1 << 16, (700, 900)).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "c.png")
    Image.fromarray(np.rint(levels / 257).astype(np.uint8)).save(tmp_path / "d.png")
    np.testing.assert_array_equal(
        read_image(tmp_path / "c.png", 256), read_image(tmp_path / "d.png", 256)
    )
