"""The command line of a training run; ``fastalex.training.config`` makes settings of it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from fastalex._version import __version__
from fastalex.common.command_line import Parser, whole_number
from fastalex.data.augment import AUGMENTATIONS, COLOR_NOISES
from fastalex.data.normalization import NORMALIZATIONS
from fastalex.model import ablations
from fastalex.model.variants import VARIANTS
from fastalex.training.config import DEFAULTS, PRECISIONS
from fastalex.training.recipes import (
    INITIALISATIONS,
    MOMENTUM_RULES,
    NO_RECIPE,
    RECIPES,
    SCHEDULES,
)


def parse_arguments(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The options of a command line by name; None reads the process's.

    An option that was not given is None.

    Raises:
        SystemExit: with code 2 and one line on stderr, where the command line is wrong.
    """
    options = vars(_parser().parse_args(arguments))
    recipe = RECIPES.get(options["recipe"], NO_RECIPE)
    return ablations.apply_arguments(options, options["variant"] or recipe.variant)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m fastalex.train",
        usage="%(prog)s [--gpus N] [--data DIR] [--recipe NAME | --resume RUN] [options]",
        description="Train the AlexNet of 2012 on one GPU or, its two towers apart, on two; "
        "without a GPU, on as many CPU processes.",
        epilog="Without --data it trains on a built-in set of ten drawn classes and needs no "
        "download. `python -m fastalex.data photos DIR` makes a folder of real photographs. "
        "A recipe changes the defaults below; docs/training.md has the table.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastalex {__version__}")
    _add_processes(parser.add_argument_group("where it runs"))
    _add_data(parser.add_argument_group("data"))
    _add_net(parser.add_argument_group("net"))
    ablations.add_arguments(parser.add_argument_group("ablations"))
    _add_training(parser.add_argument_group("training"))
    _add_schedule(parser.add_argument_group("learning rate"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_processes(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--gpus",
        type=whole_number(1),
        metavar="N",
        help="processes, one per GPU, or CPU processes where there is no GPU (default: 1; under "
        "torchrun, as many as it started; with --resume, as many as before)",
    )
    group.add_argument(
        "--threads",
        type=whole_number(1),
        metavar="N",
        help="CPU threads of each process (default: the cores shared out)",
    )
    group.add_argument(
        "--workers",
        type=whole_number(0),
        metavar="N",
        help=f"threads that load batches ahead ({_by_data('workers')})",
    )
    group.add_argument(
        "--timeout",
        type=_number(1),
        metavar="SECONDS",
        help="end the run when a process has kept the others waiting for this long, after its "
        "first step (default: 120)",
    )
    group.add_argument("--precision", choices=tuple(PRECISIONS), help=_choices(PRECISIONS))
    group.add_argument(
        "--fused-update",
        action=argparse.BooleanOptionalAction,
        help="make each step without autograd and update each weight in the kernel that makes its "
        "gradient; not with float16, whose gradients are looked at first (default: on a GPU)",
    )
    group.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        help="launch a step as one captured graph (default: on a GPU, with --fused-update)",
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
        type=whole_number(1),
        metavar="PIXELS",
        help=f"side of the images the net gets ({_by_data('image_size')})",
    )
    group.add_argument(
        "--batch-size",
        type=whole_number(1),
        metavar="N",
        help=f"images in a step, over all processes ({_by_data('batch_size')})",
    )
    group.add_argument(
        "--augmentation",
        choices=tuple(AUGMENTATIONS),
        help=_choices(AUGMENTATIONS, NO_RECIPE.augmentation),
    )
    group.add_argument(
        "--color-noise",
        choices=tuple(COLOR_NOISES),
        help=f"where --augmentation full has its numbers from: {_choices(COLOR_NOISES)}",
    )
    group.add_argument(
        "--normalization",
        choices=tuple(NORMALIZATIONS),
        help=_choices(NORMALIZATIONS, NO_RECIPE.normalization),
    )


def _add_net(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--variant",
        choices=tuple(VARIANTS),
        help="paper: as the paper prints it; source2012: the authors' program; caffe: its widely "
        "copied single-GPU form; owt: one tower, no LRN, as in torchvision (default: "
        f"{NO_RECIPE.variant})",
    )
    group.add_argument(
        "--init",
        choices=tuple(INITIALISATIONS),
        help=_choices(INITIALISATIONS, NO_RECIPE.init),
    )
    group.add_argument(
        "--dropout",
        type=_number(0, below=1),
        metavar="P",
        help=f"probability that a unit of fc6 or fc7 is dropped (default: {NO_RECIPE.dropout})",
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        help="train as was published: sets variant, initialisation, optimizer, schedule, "
        "augmentation, batch size and epochs, each of which can still be given",
    )
    group.add_argument(
        "--epochs",
        type=whole_number(1),
        metavar="N",
        help=f"passes over the training images ({_by_data('epochs')})",
    )
    group.add_argument(
        "--max-steps", type=whole_number(1), metavar="N", help="stop after this many steps"
    )
    group.add_argument(
        "--momentum",
        type=_number(0, below=1),
        metavar="M",
        help=f"of stochastic gradient descent (default: {NO_RECIPE.momentum})",
    )
    group.add_argument(
        "--momentum-rule",
        choices=tuple(MOMENTUM_RULES),
        help=_choices(MOMENTUM_RULES, NO_RECIPE.momentum_rule),
    )
    group.add_argument(
        "--weight-decay",
        type=_number(0),
        metavar="D",
        help=f"pull of the weights to zero (default: {NO_RECIPE.weight_decay})",
    )
    group.add_argument(
        "--bias-lr",
        type=_number(0),
        metavar="FACTOR",
        help="learning rate of the biases, times --lr (default: the variant's)",
    )
    group.add_argument(
        "--bias-decay",
        type=_number(0),
        metavar="FACTOR",
        help="decay of the biases, times --weight-decay (default: the variant's)",
    )
    group.add_argument(
        "--bias-schedule",
        action=argparse.BooleanOptionalAction,
        help="whether the rate of the biases follows the schedule (default: yes)",
    )
    group.add_argument(
        "--seed",
        type=whole_number(0, 2**63 - 1),
        metavar="N",
        help="decides weights, order, crops, colours and dropout, the same for one process and "
        "for two (default: 0)",
    )


def _add_schedule(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--lr",
        type=_number(0, above=True),
        metavar="RATE",
        help=f"learning rate (default: {NO_RECIPE.lr})",
    )
    group.add_argument(
        "--schedule", choices=tuple(SCHEDULES), help=_choices(SCHEDULES, NO_RECIPE.schedule)
    )
    group.add_argument(
        "--lr-drop",
        type=_shares,
        metavar="SHARES",
        help="shares of the steps after which the learning rate drops, as in 0.7 or "
        "25/90,51/90,79/90; 1 never does (default: 0.8)",
    )
    group.add_argument(
        "--lr-step",
        type=_share,
        metavar="SHARE",
        help="share of the steps between two drops, as in 30/90 (default: 1/3)",
    )
    group.add_argument(
        "--lr-gamma",
        type=_number(0, below=1, above=True),
        metavar="FACTOR",
        help=f"what a drop multiplies the learning rate by (default: {NO_RECIPE.lr_gamma})",
    )
    group.add_argument(
        "--lr-power",
        type=_number(0, above=True),
        metavar="P",
        help=f"exponent of poly (default: {NO_RECIPE.lr_power})",
    )
    group.add_argument(
        "--lr-patience",
        type=whole_number(1),
        metavar="EPOCHS",
        help="epochs without a better validation error before a plateau's drop (default: "
        f"{NO_RECIPE.lr_patience})",
    )
    group.add_argument(
        "--lr-max-drops",
        type=whole_number(0),
        metavar="N",
        help="most drops that plateaus cause (default: no limit)",
    )
    group.add_argument(
        "--warmup",
        type=_number(0, below=1),
        metavar="SHARE",
        help="share of the steps in which the rate rises evenly from 0 (default: 0)",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for the run, a new or empty one; where it holds a run of the same options, "
        "that goes on (default: the next free runs/VARIANT-SEED-NNN)",
    )
    group.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="go on with the run in this folder, with its settings, from its last checkpoint; with "
        "--epochs N one that is finished is trained on",
    )
    group.add_argument(
        "--allow-changed-images",
        action="store_true",
        help="go on with a run although its images are not the ones it started with",
    )
    group.add_argument(
        "--checkpoint-every",
        type=whole_number(1),
        metavar="STEPS",
        help="steps between two checkpoints, besides those at the end of each epoch",
    )
    group.add_argument(
        "--checkpoint-minutes",
        type=_number(0, above=True),
        metavar="M",
        help="most minutes between two checkpoints: what a kill can cost (default: 10)",
    )
    group.add_argument(
        "--keep-checkpoints",
        type=whole_number(0),
        metavar="N",
        help="newest checkpoints that stay; 0 writes one only when the run is stopped or after "
        "--checkpoint-minutes, and removes it when the run is finished (default: 2; built-in "
        "set: 0)",
    )
    group.add_argument(
        "--log-every",
        type=whole_number(1),
        metavar="STEPS",
        help="steps between two records in metrics.jsonl (default: 10)",
    )
    group.add_argument(
        "--tensorboard",
        action="store_true",
        default=None,
        help="write curves and conv1's kernels for TensorBoard too",
    )


def _choices(texts: dict[str, str], default: str | None = None) -> str:
    lines = "; ".join(f"{name}: {text}" for name, text in texts.items())
    return f"{lines} (default: {default or next(iter(texts))})"


def _by_data(name: str) -> str:
    """What ``--help`` says about a default that depends on data and device."""
    texts = []
    for folder, where in ((False, "for the built-in set"), (True, "with --data")):
        gpu, cpu = (getattr(DEFAULTS[folder, device], name) for device in ("cuda", "cpu"))
        texts.append(f"{gpu} {where}" if gpu == cpu else f"{where} {gpu} on a GPU, {cpu} on a CPU")
    return f"default: {'; '.join(texts)}"


def _number(least: float, below: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """A finite number in a range; ``above`` leaves ``least`` itself out."""
    limits = f"above {least}" if above else f"of at least {least}"
    if below < math.inf:
        limits += f" and below {below}"

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        low = least < value if above else least <= value
        if not (low and value < below):
            raise argparse.ArgumentTypeError(f"expected a number {limits}, got {text!r}")
        return value

    return convert


def _share(text: str) -> float:
    """A share of the run, above 0 and at most 1, as a number or a fraction."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"expected a share of the run above 0 and at most 1, as 0.7 or 25/90, got {text!r}"
        )
    return value


def _shares(text: str) -> tuple[float, ...]:
    return tuple(_share(part) for part in text.split(","))
