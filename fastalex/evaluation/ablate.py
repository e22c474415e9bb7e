"""Train the paper's ablations one after the other: ``python -m fastalex.ablate``."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastalex.common.command_line import Parser, check_output, guarded
from fastalex.common.interrupts import INTERRUPTED
from fastalex.common.tables import table
from fastalex.evaluation.evaluate import is_imagenet
from fastalex.model.ablations import ABLATIONS, LOSSES, edit
from fastalex.model.variants import VARIANTS
from fastalex.training.config import chosen_variant
from fastalex.training.options import parse_arguments
from fastalex.training.weights import load_model

WHOLE, HALF = "whole", "half"
_DEFAULT = ("lrn", "overlap", HALF, "tower-traffic", "conv3", "conv4", "conv5")  # published ones


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, after a failed training that one's."""
    options, rest = _parser().parse_known_args(arguments)
    left = "give the same command again to go on"
    return guarded("ablate", lambda: _run(options, rest), left)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m fastalex.ablate",
        usage="%(prog)s [--set NAME ...] [--output DIR] [options of fastalex.train]",
        description="Train the whole net and edited ones, one after the other, and print what each "
        "edit cost beside what was published. The same command again goes on where it stopped.",
        epilog="Every other option is passed to fastalex.train.",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        choices=(*ABLATIONS, HALF),
        default=list(_DEFAULT),
        metavar="NAME",
        help=f"among {', '.join((*ABLATIONS, HALF))} (default: {' '.join(_DEFAULT)})",
    )
    parser.add_choice("--variant", VARIANTS, None, "default: that of --recipe, or paper")
    parser.add_path("--output", "folder of the runs", "DIR", default=Path("runs/ablate"))
    return parser


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    for option in ("--without", "--half", "--resume"):
        if option in rest:
            raise ValueError(f"{option}: name what to take out with --set")
    names = [WHOLE, *dict.fromkeys(options.set)]
    training = parse_arguments(rest)  # ends here where training would refuse them
    variant = options.variant or chosen_variant(training)
    for name in options.set:  # refuse what the variant lacks before anything is trained
        edit(VARIANTS[variant], () if name == HALF else (name,), name == HALF)
    check_output("--output", options.output, folder=True)
    for number, name in enumerate(names, 1):
        print(f"{number}/{len(names)} {name}", flush=True)
        edits = {WHOLE: [], HALF: ["--half"]}.get(name, ["--without", name])
        command = ["--variant", variant, *rest, *edits, "--output", str(options.output / name)]
        code = _wait(subprocess.Popen([sys.executable, "-m", "fastalex.train", *command]))
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            print(f"ablate: error: training {name} ended with code {code}", file=sys.stderr)
            return code
    print("", *report(options.output, names), sep="\n")
    return 0


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The exit code of training, which a terminal's Ctrl-C reaches too: it saves before it ends."""
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            return process.wait()


def report(output: Path, names: Sequence[str]) -> list[str]:
    """The table of the runs in ``output``, the whole net first: errors, and those published."""
    rows = [["", "", "error", "error", "lost", "lost", "published", "published"]]
    rows += [["net", "parameters", *["top-1", "top-5"] * 3]]
    first: dict[str, Any] = {}
    imagenet, notes = False, []
    for name in names:
        model, metadata = load_model(output / name / "model.safetensors")
        errors = {key: 100 * (1 - metadata[key]) for key in ("top1", "top5")}
        first = first or errors
        imagenet = is_imagenet(metadata["classes"])
        parameters = f"{sum(p.numel() for p in model.parameters()):,}"
        row = [name if name in (WHOLE, HALF) else f"without {name}", parameters]
        row += [f"{error:.1f}%" for error in errors.values()]
        loss = LOSSES.get(name)
        lost = [f"{errors[key] - first[key]:+.1f}" for key in errors]
        published = (None, None) if loss is None else (loss.top1, loss.top5)
        lost += ["-" if value is None else f"{value:+.1f}" for value in published]
        rows.append(row + ([""] * 4 if name == WHOLE else lost))
        if loss is not None:
            notes.append(f"{name}: {loss.source}{', ' if loss.note else ''}{loss.note}")
    lines = table(rows, right=7)
    lines += ["", "Errors are of the validation images' centre crops after the last epoch; lost is"]
    lines.append("the percentage points that this error is above the whole net's.")
    if not imagenet:
        lines.append("The published losses are of ImageNet; these images are another data set.")
    return [*lines, *(f"published for {note}" for note in notes)]
