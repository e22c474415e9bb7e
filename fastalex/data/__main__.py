"""Make data to train on: ``python -m fastalex.data photos DIR``; ``--help`` lists the options."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fastalex.data.photos import TRAIN_CROPS, VAL_CROPS, write_photos


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the whole usage."""
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2 where what was asked for can't be done."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ValueError, OSError) as error:
        print(f"fastalex.data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastalex.data: interrupted, nothing was written", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m fastalex.data", description="Make data to train on.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    photos = commands.add_parser(
        "photos",
        help="write crops of the public-domain photographs that scikit-image ships",
        description="Write train/CLASS/*.jpg and val/CLASS/*.jpg, crops of photographs that "
        "scikit-image ships. A class is one photograph; training and validation crops come from "
        "separate parts of it. Nothing is downloaded.",
    )
    photos.add_argument("folder", metavar="DIR", type=Path, help="a new or empty folder")
    photos.add_argument("--seed", type=int, default=0, help="decides the crops (default: 0)")
    photos.add_argument(
        "--crops-per-photo",
        type=int,
        default=TRAIN_CROPS,
        metavar="N",
        help=f"training crops of each photograph (default: {TRAIN_CROPS})",
    )
    photos.add_argument(
        "--val-crops-per-photo",
        type=int,
        default=VAL_CROPS,
        metavar="N",
        help=f"validation crops of each photograph (default: {VAL_CROPS})",
    )
    photos.set_defaults(run=_photos)
    return parser


def _photos(options: argparse.Namespace) -> int:
    folder: Path = options.folder
    count = write_photos(
        folder,
        options.seed,
        options.crops_per_photo,
        options.val_crops_per_photo,
    )
    where = shlex.quote(str(folder))
    print(f"{count} crops are in {where}; next: python -m fastalex.train --data {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
