"""What works on this machine: ``python -m fastalex.doctor``; ``--json`` is for a bug report.

Nothing but the standard library is imported before it is known to be there.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from fastalex._version import __version__
from fastalex.common.command_line import Parser, guarded

OLDEST = {"torch": "2.11", "triton": "3.6", "numpy": "", "pillow": "", "safetensors": ""}
QUICK = ("sm_80", "sm_90")  # that are compiled for where there is no GPU
_WIDTH = 100
_WRONG = 1  # exit code


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Attributes:
        part: ``"environment"``, ``"kernels"``, ...
        what: that was looked at.
        verdict: ``"ok"``, ``"wrong"``, or ``"-"`` where nothing can be wrong.
        text: what was found.
        values: the same as data.
    """

    part: str
    what: str
    verdict: str
    text: str
    values: dict[str, Any] = dataclasses.field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code. 0: nothing is wrong. 1: something is. 2: wrong arguments. 130: Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    return guarded("doctor", lambda: _run(options), "nothing was changed")


def _parser() -> Parser:
    parser = Parser(
        prog="python -m fastalex.doctor",
        description="Say what works here. On a GPU every launch of a training step is compiled, "
        "compared with float64 and timed beside cuDNN. Without one the kernels are compiled for "
        "GPUs that are not here, and each function runs in Triton's interpreter.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print data, for a bug report")
    parser.add_argument(
        "--all", action="store_true", help="every target, batch and precision, which takes minutes"
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    rows: list[Row] = []
    part = ""
    for row in look(options.all):
        rows.append(row)
        if options.json:
            continue
        if row.part != part:
            print(f"\n{row.part}" if part else row.part)
            part = row.part
        print("\n".join(_lines(row)), flush=True)
    wrong = [row for row in rows if row.verdict == "wrong"]
    if options.json:
        found = [dataclasses.asdict(row) for row in rows]
        print(json.dumps({"fastalex": __version__, "wrong": len(wrong), "rows": found}, indent=1))
    else:
        print("\nnothing is wrong" if not wrong else f"\n{len(wrong)} of {len(rows)} are wrong")
    return _WRONG if wrong else 0


def _lines(row: Row) -> list[str]:
    """A row within the width, its text wrapped."""
    head, lines = f"  {row.what:<22} {row.verdict:<6} ", []
    for line in row.text.splitlines() or [""]:
        while len(head) + len(line) > _WIDTH and " " in line[: _WIDTH - len(head)]:
            cut = line.rindex(" ", 0, _WIDTH - len(head))
            lines.append(head + line[:cut])
            head, line = " " * len(head), line[cut + 1 :]
        lines.append((head + line).rstrip())
        head = " " * len(head)
    return lines


def look(everything: bool) -> Iterator[Row]:
    """Look at one thing after the other; each row comes as soon as it is known."""
    usable = True
    for row in environment():
        usable &= row.verdict != "wrong"
        yield row
    if not usable:
        return
    try:
        parts = _parts(everything)
        yield from parts
    except ImportError as error:
        yield Row("environment", "fastalex", "wrong", _one_line(error))


def _parts(everything: bool) -> Iterator[Row]:
    import torch

    from fastalex.tuning import kernel_health

    yield from gpus(torch)
    if torch.cuda.is_available():
        found = kernel_health.on_gpu(everything)
    else:
        found = kernel_health.compiled(kernel_health.targets(QUICK, everything))
    for row in itertools.chain(found, kernel_health.interpreted()):
        yield Row(*row)


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
    module = {"pillow": "PIL"}.get(name, name)
    try:
        importlib.import_module(module)
        version = importlib.metadata.version(name)
    except Exception as error:  # a broken installation may raise anything
        return Row("environment", name, "wrong", f"{_one_line(error)}; pip install -U {name}")
    if oldest and _numbers(version) < _numbers(oldest):
        text = f"{version}, needed is {oldest} or newer; pip install -U '{name}>={oldest}'"
        return Row("environment", name, "wrong", text, {"version": version})
    return Row("environment", name, "ok", version, {"version": version})


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def gpus(torch: Any) -> Iterator[Row]:
    """The GPUs, their driver, and how they reach each other."""
    count = torch.cuda.device_count()
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        text = f"torch finds none; it is built for {built or 'the CPU alone'}"
        yield Row("GPU", "GPU", "-", text, {"count": 0})
        return
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm", "--format=csv"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
        yield Row("GPU", "driver", "-", found.strip())
    except (OSError, subprocess.SubprocessError):
        yield Row("GPU", "driver", "-", "there is no nvidia-smi")
    for index in range(count):
        is_ = torch.cuda.get_device_properties(index)
        text = f"{is_.name}, {is_.total_memory / 2**30:.0f} GiB, {is_.multi_processor_count} "
        text += f"processors, compute capability {is_.major}.{is_.minor}"
        yield Row("GPU", f"GPU {index}", "-", text)
    if count > 1:
        nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
        yield Row("GPU", "NCCL", "ok" if nccl else "wrong", ".".join(map(str, nccl or ("none",))))
        pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
        without = [p for p in pairs if not torch.cuda.can_device_access_peer(*p)]
        text = f"not between {without}: copies go through the host" if without else "between all"
        yield Row("GPU", "peer access", "-", text)
