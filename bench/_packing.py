"""What the processes of the packing benchmark do; it imports no torch, which they do without."""

from __future__ import annotations

import time
from pathlib import Path

from PIL import Image


def square(path: Path, size: int) -> Image.Image:
    """The paper's square, with Pillow and nothing else."""
    with Image.open(path) as file:
        image = file.convert("RGB")
        short = min(image.size)
        left, top = ((side - short) / 2 for side in image.size)
        box = (left, top, left + short, top + short)
        return image.resize((size, size), Image.Resampling.BILINEAR, box)


def decode(paths: list[Path], size: int) -> float:
    """Seconds of this process's cores."""
    started = time.process_time()
    for path in paths:
        square(path, size)
    return time.process_time() - started
