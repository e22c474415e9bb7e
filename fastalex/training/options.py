"""The command line of a training run; ``fastalex.training.config`` makes settings of it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastalex.common.command_line import Parser, whole_number
from fastalex.model import ablations
from fastalex.training.config import (
    DEFAULTS,
    PART_OF,
    Settings,
    as_option,
    chosen_variant,
    describe_setting,
    fields,
    option,
)

# What is no setting: it does not travel with the run.
_OTHERS = {
    "gpus": option(
        None, whole_number(1), "N", "processes, one per GPU or on the CPU (default: 1 or as before)"
    ),
    "threads": option(
        None, whole_number(1), "N", "CPU threads of each process (default: the cores shared out)"
    ),
    "output": option(
        None,
        Path,
        "DIR",
        "of the run, a new one or one to go on with (default: runs/VARIANT-SEED-NNN)",
    ),
    "resume": option(
        None, Path, "RUN", "go on with this run, with its settings; --epochs N trains it on"
    ),
    "config": option(None, Path, "FILE", "take the settings of a run from its run.json"),
    "allow_changed_images": option(
        None, bool, None, "go on with a run although its images are not those it started with"
    ),
}
_GROUPS = {
    "where it runs": "gpus threads workers timeout precision fused_update cuda_graph",
    "data": "data image_size batch_size augmentation color_noise normalization",
    "net": "variant init init_from freeze dropout",
    "ablations": "",
    "training": "recipe epochs max_steps momentum momentum_rule momentum_dtype weight_decay "
    "bias_lr bias_decay bias_schedule seed",
    "learning rate": "lr schedule lr_drop lr_gamma lr_patience lr_max_drops warmup",
    "output": "output resume config allow_changed_images checkpoint_every checkpoint_minutes "
    "keep_checkpoints log_every tensorboard",
}
_DESCRIBED = {**_OTHERS, **fields()}


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
    return ablations.apply_arguments(options, chosen_variant(options))


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """A command line that has ``options``; those that are None are left out."""
    words: list[str] = []
    for name, value in options.items():
        if name in ("without", "half"):
            words += [as_option(name), *(value if name == "without" else ())] if value else []
        elif isinstance(value, bool):
            words.append(describe_setting(name, value))
        elif value is not None:
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            words.append(f"{as_option(name)}={text}")
    return words


def _read_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a run.json, but for those that ``options`` leave without a part."""
    report = json.loads(options["config"].read_text(encoding="utf-8"))
    if not isinstance(report, dict) or not isinstance(report.get("settings"), dict):
        raise ValueError("expected a run's run.json, which has settings")
    found = vars(Settings.from_dict(report["settings"]))
    given = report.get("arguments") or {}
    left = {n for n, (other, v) in PART_OF.items() if (options[other] or found[other]) != v}
    # What follows the device, if it was not chosen.
    left |= {n for n in ("fused_update", "cuda_graph", "workers") if given.get(n) is None}
    found = {name: value for name, value in found.items() if name not in left}
    variant, without, half = ablations.split_name(found.pop("variant"))
    if found["init_from"] is not None:  # whose variant it is
        return found
    return {**found, "variant": variant, "without": without, "half": half}


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
    for title, names in _GROUPS.items():
        group = parser.add_argument_group(title)
        if title == "ablations":
            ablations.add_arguments(group)
        for name in names.split():
            _add(group, name, **_DESCRIBED[name].metadata)
    return parser


def _add(
    group: argparse._ArgumentGroup, name: str, takes: Any, metavar: str | None, text: str
) -> None:
    about: dict[str, Any] = {"type": takes, "metavar": metavar}
    if takes is bool:
        about = {"action": argparse.BooleanOptionalAction}
    elif isinstance(takes, Mapping):
        about = {"choices": tuple(takes)}
        text += "; ".join(f"{choice}: {what}" for choice, what in takes.items() if what)
    if "(default" not in text and (default := _default(name)):
        text += f" (default: {default})"
    group.add_argument(as_option(name), help=text, **about)


def _default(name: str) -> str:
    """What ``--help`` says about an option's default; empty where there is none."""
    if name in DEFAULTS[False, "cpu"]:
        texts = []
        for folder, where in ((False, "for the built-in set"), (True, "with --data")):
            gpu, cpu = (DEFAULTS[folder, device][name] for device in ("cuda", "cpu"))
            by_device = f"{where} {gpu} on a GPU, {cpu} on a CPU"
            texts.append(f"{gpu} {where}" if gpu == cpu else by_device)
        return "; ".join(texts)
    value = _DESCRIBED[name].default
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else ""
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
