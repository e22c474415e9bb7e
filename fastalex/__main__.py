"""The commands: ``fastalex NAME ...``, ``python -m fastalex NAME ...``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from fastalex._version import __version__

# Of each command its module, which is imported when the command is asked for, and what it does.
COMMANDS = {
    "train": ("fastalex.training.train", "train a net on one GPU, several, or the CPU"),
    "data": ("fastalex.data.__main__", "pack, verify or fetch images to train on"),
    "evaluate": ("fastalex.evaluation.evaluate", "the errors of one net, or of several averaged"),
    "predict": ("fastalex.evaluation.predict", "name what is in photographs"),
    "figures": ("fastalex.evaluation.figures", "draw the paper's figures from a trained net"),
    "report": ("fastalex.inspection.run_report", "one page about a run, for a browser"),
    "convert": ("fastalex.formats.convert", "take over weights of Caffe, torchvision, ONNX, ..."),
    "export": ("fastalex.formats.export", "write weights for ONNX, torch.export, torchvision"),
    "ablate": ("fastalex.evaluation.ablate", "train the net with parts of it taken out"),
    "roofline": ("fastalex.inspection.roofline", "what each kernel could take at the least"),
    "profiler": ("fastalex.tuning.profiler", "the time of each layer beside torch's"),
    "tune": ("fastalex.tuning.tune", "find the fastest tiles for this GPU"),
    "doctor": ("fastalex.tuning.doctor", "what works here, and what does not"),
}


def run(name: str, arguments: Sequence[str] | None = None) -> int:
    """Run the command ``name``; Ctrl-C while it is imported ends in one line.

    Args:
        name: one of COMMANDS.
        arguments: of the command; None takes the process's.

    Returns:
        The exit code.
    """
    try:
        module = importlib.import_module(COMMANDS[name][0])
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # one line for all processes of torchrun
            print(f"{name}: interrupted while starting, nothing was written", file=sys.stderr)
        return 130
    return int(module.main(arguments))


def main() -> int:
    """Run the process's command line; returns the exit code."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        return run(name, rest)
    if name in ("-V", "--version"):
        print(f"fastalex {__version__}")
        return 0
    if name in ("-h", "--help"):
        print("usage: fastalex COMMAND [options]\n\nAlexNet (2012) on Triton kernels.\n\ncommands:")
        for command, (_, text) in COMMANDS.items():
            print(f"  {command:10}{text}")
        print("\n`fastalex COMMAND --help` lists the options of a command; --version is ours.")
        return 0
    print(f"fastalex: error: no command {name!r}: {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
