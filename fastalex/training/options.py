"""The command line of a training run; ``fastalex.training.config`` makes settings of it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

from fastalex._version import __version__
from fastalex.common.command_line import Parser, whole_number
from fastalex.data.augment import AUGMENTATIONS, COLOR_NOISES
from fastalex.data.normalization import NORMALIZATIONS
from fastalex.model import ablations
from fastalex.model.variants import VARIANTS
from fastalex.training.config import DEFAULTS, PART_OF, PRECISIONS, Settings, plain_defaults
from fastalex.training.fine_tuning import FREEZES
from fastalex.training.recipes import (
    INITIALISATIONS,
    MOMENTUM_RULES,
    NO_RECIPE,
    RECIPES,
    SCHEDULES,
)

_LARGEST_IMAGE = 2048  # pixels: the built-in set draws a thousand images of this size first


class Raising(Parser):
    """A parser that raises ValueError where the options are wrong."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_arguments(
    arguments: Sequence[str] | None = None, kind: type[Parser] = Parser
) -> dict[str, Any]:
    """The options of a command line by name; None reads the process's.

    An option that was not given is None, or what the file of --config says.

    Args:
        arguments: the command line.
        kind: of the parser, whose ``error`` is called where the command line is wrong.

    Raises:
        SystemExit: with code 2 and one line on stderr, where the command line is wrong.
    """
    parser, arguments = _parser(kind), list(sys.argv[1:] if arguments is None else arguments)
    options = vars(parser.parse_args(arguments))
    if options["config"] is not None:
        try:
            from_file = as_arguments(_read_config(options))
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            parser.error(f"--config {options['config']}: {why}")
        options = vars(parser.parse_args([*from_file, *arguments]))
    recipe = RECIPES.get(options["recipe"], NO_RECIPE)
    return ablations.apply_arguments(options, options["variant"] or recipe.variant)


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """A command line that has ``options``; those that are None are left out."""
    words: list[str] = []
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            switch = any(name in group and group[name][0] is _SWITCH for group in _OPTIONS.values())
            words += [option] if value else ["--no-" + option[2:]] if switch else []
        elif name == "without":
            words += [option, *value] if value else []
        elif value is not None:
            many = isinstance(value, (list, tuple))
            words += [f"{option}={','.join(map(str, value)) if many else value}"]
    return words


def _read_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a run.json, but for those that ``options`` leave without a part.

    Raises:
        ValueError: where it is no such file.
    """
    report = json.loads(options["config"].read_text(encoding="utf-8"))
    if not isinstance(report, dict) or not isinstance(report.get("settings"), dict):
        raise ValueError("expected a run's run.json, which has settings")
    settings = report["settings"]
    given = report.get("arguments") or {}
    found = vars(Settings.from_dict(settings)) if settings else {}
    schedule = options["schedule"] or found.get("schedule")
    for name, schedules in PART_OF.items():
        if schedule not in schedules:
            found.pop(name, None)
    if (options["augmentation"] or found.get("augmentation")) != "full":
        found.pop("color_noise", None)
    for name in ("fused_update", "cuda_graph", "workers"):  # follow the device, if not chosen
        if given.get(name) is None:
            found.pop(name, None)
    variant, without, half = ablations.split_name(str(found.pop("variant", "paper")))
    if found.get("init_from") is not None:  # whose variant it is
        return found
    return {**found, "variant": variant, "without": without, "half": half}


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


_COUNT, _FLAG, _SWITCH = whole_number(1), "flag", "switch"

# By group and name: what it takes, how --help calls that, and what it is. A mapping holds choices,
# its texts say what they are; a switch has a --no- of its own. See ``_default`` for defaults.
_OPTIONS: dict[str, dict[str, tuple[Any, str | None, str]]] = {
    "where it runs": {
        "gpus": (
            _COUNT, "N", "processes, one per GPU, or CPU processes where there is no GPU (default: "
            "1; under torchrun, as many as it started; with --resume, as many as before)",
        ),
        "threads": (_COUNT, "N", "CPU threads of each process (default: the cores shared out)"),
        "workers": (whole_number(0), "N", "threads that load batches ahead"),
        "timeout": (
            _number(1), "SECONDS", "end the run when a process has kept the others waiting for "
            "this long, after its first step",
        ),
        "precision": (PRECISIONS, None, ""),
        "fused_update": (
            _SWITCH, None, "make each step without autograd and update each weight in the kernel "
            "that makes its gradient; not with float16, whose gradients are looked at first "
            "(default: on a GPU)",
        ),
        "cuda_graph": (
            _SWITCH, None, "launch a step as one captured graph (default: on a GPU, with "
            "--fused-update)",
        ),
    },
    "data": {
        "data": (
            Path, "DIR", "folder with train/CLASS/IMAGE and val/CLASS/IMAGE (default: the "
            "built-in set)",
        ),
        "image_size": (
            whole_number(1, _LARGEST_IMAGE), "PIXELS", "side of the images the net gets",
        ),
        "batch_size": (_COUNT, "N", "images in a step, over all processes"),
        "augmentation": (AUGMENTATIONS, None, ""),
        "color_noise": (COLOR_NOISES, None, "where --augmentation full has its numbers from: "),
        "normalization": (NORMALIZATIONS, None, ""),
    },
    "net": {
        "variant": (
            dict.fromkeys(VARIANTS), None, "paper: as the paper prints it; source2012: the "
            "authors' program; caffe: its widely copied single-GPU form; owt: one tower, no LRN, "
            "as in torchvision",
        ),
        "init": (INITIALISATIONS, None, ""),
        "init_from": (
            Path, "W", "begin with the weights of this file, of a run or of fastalex.convert; its "
            "variant, image size and normalization are the defaults then, and for other classes "
            "than its own the last layer is drawn anew",
        ),
        "freeze": (FREEZES, None, "what training leaves as it is: "),
        "dropout": (_number(0, below=1), "P", "probability that a unit of fc6 or fc7 is dropped"),
    },
    "ablations": {},
    "training": {
        "recipe": (
            dict.fromkeys(RECIPES), None, "train as was published: sets variant, initialisation, "
            "optimizer, schedule, augmentation, batch size and epochs, each of which can still be "
            "given",
        ),
        "epochs": (_COUNT, "N", "passes over the training images"),
        "max_steps": (_COUNT, "N", "stop after this many steps"),
        "momentum": (_number(0, below=1), "M", "of stochastic gradient descent"),
        "momentum_rule": (MOMENTUM_RULES, None, ""),
        "weight_decay": (_number(0), "D", "pull of the weights to zero"),
        "bias_lr": (
            _number(0), "FACTOR", "learning rate of the biases, times --lr (default: the "
            "variant's)",
        ),
        "bias_decay": (
            _number(0), "FACTOR", "decay of the biases, times --weight-decay (default: the "
            "variant's)",
        ),
        "bias_schedule": (_SWITCH, None, "whether the rate of the biases follows the schedule"),
        "seed": (
            whole_number(0, 2**63 - 1), "N", "decides weights, order, crops, colours and dropout, "
            "the same for one process and for two",
        ),
    },
    "learning rate": {
        "lr": (_number(0, above=True), "RATE", "learning rate"),
        "schedule": (SCHEDULES, None, ""),
        "lr_drop": (
            _shares, "SHARES", "shares of the steps after which the learning rate drops, as in 0.7 "
            "or 25/90,51/90,79/90; 1 never does",
        ),
        "lr_step": (
            _share, "SHARE", "share of the steps between two drops, as in 30/90 (default: 1/3)",
        ),
        "lr_gamma": (
            _number(0, below=1, above=True), "FACTOR", "what a drop multiplies the learning rate "
            "by",
        ),
        "lr_power": (_number(0, above=True), "P", "exponent of poly"),
        "lr_patience": (
            _COUNT, "EPOCHS", "epochs without a better validation error before a plateau's drop",
        ),
        "lr_max_drops": (
            whole_number(0), "N", "most drops that plateaus cause (default: no limit)",
        ),
        "warmup": (
            _number(0, below=1), "SHARE", "share of the steps in which the rate rises evenly "
            "from 0",
        ),
    },
    "output": {
        "output": (
            Path, "DIR", "folder for the run, a new or empty one; where it holds a run of the same "
            "options, that goes on (default: the next free runs/VARIANT-SEED-NNN)",
        ),
        "resume": (
            Path, "RUN", "go on with the run in this folder, with its settings, from its last "
            "checkpoint; with --epochs N one that is finished is trained on",
        ),
        "config": (
            Path, "FILE", "take the settings of a run from its run.json; what is given beside it "
            "counts more",
        ),
        "allow_changed_images": (
            _FLAG, None, "go on with a run although its images are not the ones it started with",
        ),
        "checkpoint_every": (
            _COUNT, "STEPS", "steps between two checkpoints, besides those at the end of each "
            "epoch",
        ),
        "checkpoint_minutes": (
            _number(0, above=True), "M", "most minutes between two checkpoints: what a kill can "
            "cost",
        ),
        "keep_checkpoints": (
            whole_number(0), "N", "newest checkpoints that stay; 0 writes one only when the run is "
            "stopped or after --checkpoint-minutes, and removes it when the run is finished",
        ),
        "log_every": (_COUNT, "STEPS", "steps between two records in metrics.jsonl"),
        "tensorboard": (_FLAG, None, "write curves for TensorBoard too"),
    },
}  # fmt: skip


def _parser(kind: type[Parser] = Parser) -> Parser:
    parser = kind(
        prog="python -m fastalex.train",
        usage="%(prog)s [--gpus N] [--data DIR] [--recipe NAME | --resume RUN] [options]",
        description="Train the AlexNet of 2012 on one GPU or, its two towers apart, on two; "
        "without a GPU, on as many CPU processes.",
        epilog="Without --data it trains on a built-in set of ten drawn classes and needs no "
        "download. `python -m fastalex.data photos DIR` makes a folder of real photographs. "
        "A recipe changes the defaults below; docs/training.md has the table.",
    )
    parser.add_argument("--version", action="version", version=f"fastalex {__version__}")
    for title, options in _OPTIONS.items():
        group = parser.add_argument_group(title)
        if title == "ablations":
            ablations.add_arguments(group)
        for name, option in options.items():
            _add(group, name, *option)
    return parser


def _add(
    group: argparse._ArgumentGroup, name: str, takes: Any, metavar: str | None, text: str
) -> None:
    about: dict[str, Any] = {"type": takes, "metavar": metavar}
    if takes is _FLAG:
        about = {"action": "store_true", "default": None}
    elif takes is _SWITCH:
        about = {"action": argparse.BooleanOptionalAction}
    elif isinstance(takes, Mapping):
        about = {"choices": tuple(takes)}
        text += "; ".join(f"{choice}: {what}" for choice, what in takes.items() if what)
    if "(default" not in text and (default := _default(name)):
        text += f" (default: {default})"
    group.add_argument("--" + name.replace("_", "-"), help=text, **about)


def _default(name: str) -> str:
    """What ``--help`` says about an option's default; empty where there is none."""
    if name in DEFAULTS[False, "cpu"]:
        texts = []
        for folder, where in ((False, "for the built-in set"), (True, "with --data")):
            gpu, cpu = (DEFAULTS[folder, device][name] for device in ("cuda", "cpu"))
            by_device = f"{where} {gpu} on a GPU, {cpu} on a CPU"
            texts.append(f"{gpu} {where}" if gpu == cpu else by_device)
        return "; ".join(texts)
    value = plain_defaults().get(name)
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else ""
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
