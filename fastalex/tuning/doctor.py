"""What works on this machine: ``python -m fastalex.doctor``; ``--json`` is for a bug report.

Nothing but the standard library is imported before it is known to be there.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import subprocess
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fastalex._version import __version__
from fastalex.common.command_line import Parser, guarded

OLDEST = {"torch": "2.11", "triton": "3.6", "numpy": "", "pillow": "", "safetensors": ""}
_WIDTH = 100
_WRONG = 1  # exit code


class Row(NamedTuple):
    """One thing that was looked at."""

    part: str  # environment, kernels, ...
    what: str  # was looked at
    verdict: str  # ok, wrong, or - where nothing can be wrong
    text: str  # what was found
    values: Mapping[str, Any] = {}  # the same as data


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code, 1 where something is wrong."""
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    return guarded("doctor", lambda: _run(options), "nothing was changed")


def _parser() -> Parser:
    parser = Parser(
        prog="python -m fastalex.doctor",
        description="Say what works here. On a GPU every launch of a training step is compiled, "
        "compared with float64 and timed beside cuDNN. Without one the kernels are compiled for "
        "a GPU that is not here, and each function runs in Triton's interpreter.",
    )
    parser.add_flag("--json", "print data, for a bug report")
    parser.add_flag("--all", "every target, batch and precision, which takes minutes")
    return parser


def _run(options: argparse.Namespace) -> int:
    rows: list[Row] = []
    for row in look(options.all):
        if not options.json:
            head = f"  {row.what:<22} {row.verdict:<6} "
            if not rows or row.part != rows[-1].part:
                print(f"\n{row.part}" if rows else row.part)
            indent = {"initial_indent": head, "subsequent_indent": " " * len(head)}
            print(textwrap.fill(row.text, _WIDTH, **indent), flush=True)  # type: ignore[arg-type]
        rows.append(row)
    wrong = [row for row in rows if row.verdict == "wrong"]
    if options.json:
        found = [row._asdict() for row in rows]
        print(json.dumps({"fastalex": __version__, "wrong": len(wrong), "rows": found}, indent=1))
    else:
        print("\nnothing is wrong" if not wrong else f"\n{len(wrong)} of {len(rows)} are wrong")
    return _WRONG if wrong else 0


def look(everything: bool) -> Iterator[Row]:
    """Look at one thing after the other; each row comes as soon as it is known."""
    usable = True
    for row in environment():
        usable &= row.verdict != "wrong"
        yield row
    if not usable:
        return
    try:
        import torch

        from fastalex.common.compile import TARGETS
        from fastalex.tuning import kernel_health
    except ImportError as error:
        yield Row("environment", "fastalex", "wrong", _one_line(error))
        return
    yield from gpus(torch)
    if torch.cuda.is_available():
        found = kernel_health.on_gpu(everything)
    else:
        found = kernel_health.compiled(list(TARGETS) if everything else ["sm_90"])
    for parts in itertools.chain(found, kernel_health.interpreted()):
        yield Row(*parts)


def environment() -> Iterator[Row]:
    """Python, what is installed, and the machine."""
    yield Row("environment", "fastalex", "-", __version__)
    yield Row("environment", "python", "-", f"{platform.python_version()}, {platform.platform()}")
    for name, oldest in OLDEST.items():
        yield _package(name, oldest)
    cores = len(os.sched_getaffinity(0))
    yield Row("environment", "cpu", "-", f"{platform.machine()}, {cores} cores", {"cores": cores})


def _package(name: str, oldest: str) -> Row:
    """Whether a package is there, new enough, and can be imported."""
    try:
        importlib.import_module({"pillow": "PIL"}.get(name, name))
        version = importlib.metadata.version(name)
    except Exception as error:  # a broken installation may raise anything
        return Row("environment", name, "wrong", f"{_one_line(error)}; pip install -U {name}")
    if oldest and _numbers(version) < _numbers(oldest):
        text = f"{version}, needed is {oldest} or newer; pip install -U '{name}>={oldest}'"
        return Row("environment", name, "wrong", text, {"version": version})
    return Row("environment", name, "ok", version, {"version": version})


def _numbers(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", version)[:2]]


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")


def gpus(torch: Any) -> Iterator[Row]:
    """The GPUs, their driver, and how they reach each other."""
    count = torch.cuda.device_count()
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip or "the CPU alone"
        yield Row("GPU", "GPU", "-", f"torch finds none; it is built for {built}", {"count": 0})
        return
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm", "--format=csv"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        found = "there is no nvidia-smi"
    yield Row("GPU", "driver", "-", found)
    for index in range(count):
        is_ = torch.cuda.get_device_properties(index)
        text = f"{is_.name}, {is_.total_memory / 2**30:.0f} GiB, {is_.multi_processor_count} "
        text += f"processors, compute capability {is_.major}.{is_.minor}"
        yield Row("GPU", f"GPU {index}", "-", text)
    if count > 1:
        nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ("none",)
        verdict = "wrong" if nccl == ("none",) else "ok"
        yield Row("GPU", "NCCL", verdict, ".".join(map(str, nccl)))
        pairs = itertools.permutations(range(count), 2)
        without = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
        text = f"not between {without}: copies go through the host" if without else "between all"
        yield Row("GPU", "peer access", "-", text)
