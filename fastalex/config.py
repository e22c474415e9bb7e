"""The settings of a training run, and the command line that gives them.

Where an option is not given and its default depends on data and device, ``DEFAULTS`` has it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fastalex import ablations
from fastalex._version import __version__
from fastalex.variants import VARIANTS

INITIALISATIONS = {
    "he": "weights of variance 2 / fan-in, biases 0",
    "published": "as the authors of the variant drew theirs",
}


@dataclass(frozen=True)
class Defaults:
    """What options take that are not given."""

    image_size: int
    batch_size: int
    epochs: int
    workers: int


# The key is whether there is a folder of images, and the device.
DEFAULTS: dict[tuple[bool, str], Defaults] = {
    (False, "cpu"): Defaults(image_size=64, batch_size=64, epochs=6, workers=1),
    (False, "cuda"): Defaults(image_size=64, batch_size=64, epochs=6, workers=4),
    (True, "cpu"): Defaults(image_size=96, batch_size=64, epochs=10, workers=1),
    (True, "cuda"): Defaults(image_size=224, batch_size=128, epochs=90, workers=8),
}


@dataclass(frozen=True)
class Settings:
    """What a run does, every default filled in."""

    data: Path | None
    variant: str
    init: str
    dropout: float
    image_size: int
    batch_size: int
    epochs: int
    max_steps: int | None
    lr: float
    lr_drop: float
    momentum: float
    weight_decay: float
    seed: int
    log_every: int
    workers: int
    augmentation: str

    @classmethod
    def choose(cls, arguments: Mapping[str, Any], device_type: str) -> Settings:
        """The settings that ``arguments``, from ``parse_arguments``, come to on a device."""
        defaults = DEFAULTS[arguments["data"] is not None, device_type]
        names = [field.name for field in dataclasses.fields(cls)]
        values = {name: arguments[name] for name in names}
        for name, value in dataclasses.asdict(defaults).items():
            if values[name] is None:
                values[name] = value
        return cls(**values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the whole usage, and from one of torchrun's processes only."""
        if os.environ.get("RANK", "0") == "0":
            print(f"train: error: {message} (--help lists the options)", file=sys.stderr)
        raise SystemExit(2)


def parse_arguments(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The options of a command line by name; None reads the process's.

    An option that was not given and has no default of its own is None.

    Raises:
        SystemExit: with code 2 and one line on stderr, where the command line is wrong.
    """
    options = vars(_parser().parse_args(arguments))
    return ablations.apply_arguments(options, options["variant"])


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m fastalex.train",
        usage="%(prog)s [--gpus {1,2}] [--data DIR] [options]",
        description="Train the AlexNet of 2012 on one GPU or, its two towers apart, on two; "
        "without a GPU, on as many CPU processes.",
        epilog="Without --data it trains on a built-in set of ten drawn classes and needs no "
        "download. `python -m fastalex.data photos DIR` makes a folder of real photographs.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastalex {__version__}")
    _add_processes(parser.add_argument_group("where it runs"))
    _add_data(parser.add_argument_group("data"))
    _add_net(parser.add_argument_group("net"))
    ablations.add_arguments(parser.add_argument_group("ablations"))
    _add_training(parser.add_argument_group("training"))
    _add_output(parser.add_argument_group("output"))
    parser.set_defaults(augmentation="crop")
    return parser


def _add_processes(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--gpus",
        type=int,
        choices=(1, 2),
        help="processes, one per GPU, or CPU processes where there is no GPU (default: 1; under "
        "torchrun, as many as it started)",
    )
    group.add_argument(
        "--threads",
        type=_integer(1),
        metavar="N",
        help="CPU threads of each process (default: the cores shared out)",
    )
    group.add_argument(
        "--workers",
        type=_integer(0),
        metavar="N",
        help=f"threads that load batches ahead ({_default('workers')})",
    )


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with train/CLASS/IMAGE and val/CLASS/IMAGE (default: the built-in set)",
    )
    group.add_argument(
        "--image-size",
        type=_integer(1),
        metavar="PIXELS",
        help=f"side of the images the net gets ({_default('image_size')})",
    )
    group.add_argument(
        "--batch-size",
        type=_integer(1),
        metavar="N",
        help=f"images in a step, over all processes ({_default('batch_size')})",
    )


def _add_net(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--variant",
        choices=tuple(VARIANTS),
        default="paper",
        help="paper: as the paper prints it; source2012: the authors' program; caffe: its widely "
        "copied single-GPU form; owt: one tower, no LRN, as in torchvision (default: %(default)s)",
    )
    group.add_argument(
        "--init",
        choices=tuple(INITIALISATIONS),
        default="he",
        help="; ".join(f"{k}: {v}" for k, v in INITIALISATIONS.items()) + " (default: %(default)s)",
    )
    group.add_argument(
        "--dropout",
        type=_number(0, below=1),
        default=0.5,
        metavar="P",
        help="probability that a unit of fc6 or fc7 is dropped (default: %(default)s)",
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--epochs",
        type=_integer(1),
        metavar="N",
        help=f"passes over the training images ({_default('epochs')})",
    )
    group.add_argument(
        "--max-steps", type=_integer(1), metavar="N", help="stop after this many steps"
    )
    group.add_argument(
        "--lr",
        type=_number(0, above=True),
        default=0.01,
        metavar="RATE",
        help="learning rate (default: %(default)s)",
    )
    group.add_argument(
        "--lr-drop",
        type=_number(0, most=1),
        default=0.7,
        metavar="SHARE",
        help="share of the steps after which the learning rate is divided by ten; 1 never does "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--momentum",
        type=_number(0, below=1),
        default=0.9,
        metavar="M",
        help="of stochastic gradient descent (default: %(default)s)",
    )
    group.add_argument(
        "--weight-decay",
        type=_number(0),
        default=5e-4,
        metavar="D",
        help="pull of the weights to zero (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=_integer(0, 2**63 - 1),
        default=0,
        metavar="N",
        help="decides weights, order, crops and dropout, the same for one process and for two "
        "(default: %(default)s)",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="new or empty folder for the run (default: the next free runs/VARIANT-SEED-NNN)",
    )
    group.add_argument(
        "--log-every",
        type=_integer(1),
        default=10,
        metavar="STEPS",
        help="steps between two records in metrics.jsonl (default: %(default)s)",
    )


def _default(name: str) -> str:
    """What ``--help`` says about a default that depends on data and device."""
    texts = []
    for folder, where in ((False, "for the built-in set"), (True, "with --data")):
        gpu, cpu = (getattr(DEFAULTS[folder, device], name) for device in ("cuda", "cpu"))
        texts.append(f"{gpu} {where}" if gpu == cpu else f"{where} {gpu} on a GPU, {cpu} on a CPU")
    return f"default: {'; '.join(texts)}"


def _integer(least: int, most: int | None = None) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least or (most is not None and value > most):
            limit = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"expected a whole number {limit}, got {text!r}")
        return value

    return convert


def _number(
    least: float, below: float = math.inf, most: float = math.inf, above: bool = False
) -> Callable[[str], float]:
    """A finite number in a range; ``above`` leaves ``least`` itself out."""
    limits = f"above {least}" if above else f"of at least {least}"
    if most < math.inf:
        limits += f" and at most {most}"
    elif below < math.inf:
        limits += f" and below {below}"

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        low = least < value if above else least <= value
        if not (low and value < below and value <= most):
            raise argparse.ArgumentTypeError(f"expected a number {limits}, got {text!r}")
        return value

    return convert
