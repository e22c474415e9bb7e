"""Name what images show: ``python -m fastalex.predict IMAGE... --weights W``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastalex.common.command_line import REFUSED, Parser, guarded
from fastalex.data import decode_size
from fastalex.data.base import Pixels, printable
from fastalex.data.decode import read_image, try_read
from fastalex.evaluation.ensemble import CROPS, TOP, Ensemble, rank_classes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2 where an image could not be read."""
    options = _parser().parse_args(arguments)
    return guarded("predict", lambda: _run(options))


def _parser() -> Parser:
    parser = Parser(
        prog="python -m fastalex.predict",
        usage="%(prog)s IMAGE [IMAGE ...] --weights W [options]",
        description="Print the most probable classes of image files.",
    )
    parser.add_path("images", "an image file", "IMAGE", nargs="+")
    text = "weights file (model.safetensors of a run); given again, their nets are averaged"
    parser.add_path("--weights", text, "W", action="append", required=True)
    parser.add_count("--top", "classes printed for each image", TOP)
    text = "of each image, averaged: 1 is the centre, 10 the paper's"
    parser.add_choice("--crops", CROPS, 10, text)
    parser.add_count("--batch-size", "images in a pass through the net", 32)
    return parser


def read_files(paths: Sequence[Path], size: int) -> list[Pixels | str]:
    """The centre square of each image file, uint8 [size, size, 3], or why it can't be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on metadata, without the file's name
        return [try_read(read_image, path, size) for path in paths]


def _run(options: argparse.Namespace) -> int:
    ensemble = Ensemble(options.weights)
    width = max(map(len, ensemble.classes))
    code = 0
    for start in range(0, len(options.images), options.batch_size):
        paths = options.images[start : start + options.batch_size]
        read = read_files(paths, decode_size(ensemble.image_size))
        good = [pixels for pixels in read if not isinstance(pixels, str)]
        rows = iter(ensemble.probabilities(np.stack(good), options.crops) if good else ())
        for path, pixels in zip(paths, read, strict=True):
            if isinstance(pixels, str):
                print(f"predict: error: {printable(str(path))}: {pixels}", file=sys.stderr)
                code = REFUSED
                continue
            row = next(rows)
            print(printable(str(path)))
            for label in rank_classes(row[None], options.top)[0]:
                print(f"  {ensemble.classes[label]:{width}}  {float(row[label]):6.1%}")
    return code
