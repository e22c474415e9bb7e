"""Make data to train on: ``python -m fastalex.data pack SRC DST``; ``--help`` lists the options."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fastalex.common.command_line import Parser, guarded
from fastalex.data.base import cores
from fastalex.data.pack import LEFT_OUT, ODD, SIZE, VAL_SPLIT, pack
from fastalex.data.packed import MAX_SIZE, verify
from fastalex.data.photos import write_photos

_NAMED = 10  # files named before the rest are only counted


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2 where what was asked for can't be done."""
    options = _parser().parse_args(arguments)
    return guarded("data", lambda: int(options.run(options)))


def _parser() -> Parser:
    parser = Parser(prog="python -m fastalex.data", description="Make data to train on.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    command = commands.add_parser(
        "pack",
        help="decode a folder of images once, to train from",
        description="Decode every image of SRC once and write DST, a set that "
        "`python -m fastalex.train --data DST` reads without decoding anything. The shorter side "
        "becomes 256 pixels, and the middle of the longer one is kept. However it ends, the same "
        "command goes on where it was.",
    )
    command.add_path("source", "folder with train/CLASS and val/CLASS, or CLASS", "SRC")
    command.add_path("folder", "a new or empty folder", "DST")
    command.add_count("--size", "side of the packed images in pixels", SIZE, most=MAX_SIZE)
    command.add_argument(
        "--val-split",
        type=float,
        metavar="SHARE",
        help="where SRC has no val folder: share of the images of each class, evenly spaced, that "
        f"are kept for validation (default: {VAL_SPLIT})",
    )
    command.add_count("--workers", "images decoded at a time (default: as many as cores)")
    command.set_defaults(run=_pack)
    command = commands.add_parser(
        "verify",
        help="compare a packed set with its checksums",
        description="Read all of a packed set and name every image that does not match its "
        "checksum. The exit code is 0 for a good set, 1 for a damaged one.",
    )
    command.add_path("folder", "a packed set", "DST")
    command.set_defaults(run=_verify)
    command = commands.add_parser(
        "photos",
        help="write crops of the public-domain photographs that scikit-image ships",
        description="Write train/CLASS/*.jpg and val/CLASS/*.jpg, crops of photographs that "
        "scikit-image ships. A class is one photograph; training and validation crops come from "
        "separate parts of it. Nothing is downloaded.",
    )
    command.add_path("folder", "a new or empty folder", "DIR")
    command.set_defaults(run=_photos)
    return parser


def _pack(options: argparse.Namespace) -> int:
    folder: Path = options.folder
    packed = pack(options.source, folder, options.size, options.workers, options.val_split)
    _list(folder / ODD, "packed")
    left_out = _list(folder / LEFT_OUT, "left out")
    kinds = {"train": "training", "val": "validation"}
    counts = " and ".join(f"{count:,} {kinds[part]}" for part, count in packed.counts.items())
    where = shlex.quote(str(folder))
    there = "are in" if packed.decoded else "were already in"
    print(f"{counts} images {there} {where}, {left_out:,} files left out")
    if packed.decoded:
        rate = packed.decoded / packed.seconds
        print(f"{packed.decoded:,} files in {packed.seconds:.1f} s, {rate:,.0f} images/s")
    print(f"next: python -m fastalex.train --data {where}")
    return 0


def _list(table: Path, what: str) -> int:
    """Name the first files of a table of a set; returns how many there are."""
    lines = table.read_text(encoding="utf-8").splitlines()
    for line in lines[:_NAMED]:
        print(line.replace("\t", f": {what}: ", 1), file=sys.stderr)
    if len(lines) > _NAMED:
        print(f"{len(lines) - _NAMED:,} more {what}, see {table}", file=sys.stderr)
    return len(lines)


def _verify(options: argparse.Namespace) -> int:
    total, damaged = verify(options.folder, cores())
    for line in damaged[:_NAMED]:
        print(line, file=sys.stderr)
    where = shlex.quote(str(options.folder))
    if damaged:
        print(f"{where}: {len(damaged):,} of {total:,} images are damaged, pack the set again")
        return 1
    print(f"{where}: all {total:,} images match their checksums")
    return 0


def _photos(options: argparse.Namespace) -> int:
    count = write_photos(options.folder)
    where = shlex.quote(str(options.folder))
    print(f"{count} crops are in {where}; next: python -m fastalex.train --data {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
