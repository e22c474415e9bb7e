"""Fill the tables of docs/generated/kernels.md from the roofline report; no GPU is needed.

    python docs/kernel_figures.py

A table stands between ``<!-- figures KERNEL ... -->`` and ``<!-- end -->``, one row for each launch
of one of these kernels in a training step; a cell holds the H100's figure and the A100's. What two
towers exchange, on two H100, stands behind ``<!-- exchanges -->``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("generated") / "kernels.md"
GPUS = ("h100", "a100")
HEAD = (
    "launch", "grid", "tile, warps", "registers", "shared KB", "loop", "issue", "useful", "waves",
    "instr", "MB", "over floor",
)  # fmt: skip
_TABLE = re.compile(r"(<!-- figures ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
EXCHANGE_HEAD = ("before", "pass", "MB each way", "exchange us", "meanwhile us", "waited us")
_EXCHANGES = re.compile(r"(<!-- exchanges -->\n).*?(<!-- end -->)", re.DOTALL)
_VERSION = re.compile(r"(<!-- version -->).*?(<!-- end -->)", re.DOTALL)


def report(gpu: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "fastalex.roofline", "--gpu", gpu, "--batch", "128", "--json"]
    command += options
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    moved = row["read"] + row["written"] - row["updated"]
    tile = "" if row["tile"] is None else "x".join(map(str, row["tile"])) + f", {row['warps']}"
    return (
        "x".join(map(str, row["grid"])),
        tile,
        str(row["registers"]),
        _number(round((row["shared"] or 0) / 1024, 1), "g"),
        _number(row["loop"], "d"),
        _number(row["issue_ratio"]),
        _number(row["useful"]),
        _number(row["waves"]),
        "" if row["flops"] else _number(row["instructions"], ".1f"),
        _number((row["read"] + row["written"]) / 1e6, ".1f"),
        _number(moved / row["floor_size"]) if row["floor_size"] and moved else "",
    )


def _name(row: dict[str, Any]) -> str:
    return f"{row['layer']} {row['role'] or row['phase']}"


def _lines(head: tuple[str, ...]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]


def exchanges(report: dict[str, Any]) -> str:
    """A Markdown table of what two towers exchange in a step."""
    lines = _lines(EXCHANGE_HEAD)
    for one in report["exchanges"]:
        times = [f"{one[name] * 1e6:.1f}" for name in ("seconds", "meanwhile", "waited")]
        cells = [one["layer"], one["phase"], f"{one['size'] / 1e6:.2f}", *times]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table(reports: dict[str, dict[str, Any]], kernels: list[str]) -> str:
    """A Markdown table of the launches of ``kernels``, in the order of the step."""
    found: dict[str, dict[str, list[tuple[str, ...]]]] = {}
    for gpu, made in reports.items():
        for row in made["launches"]:
            if (row["name"].strip("_").removesuffix("_kernel")) in kernels:
                found.setdefault(_name(row), {}).setdefault(gpu, []).append(_cells(row))
    lines = _lines(HEAD)
    for name, by_gpu in found.items():
        for cells in zip(*(by_gpu[gpu] for gpu in reports), strict=True):
            both = [a if a == b else f"{a} / {b}" for a, b in zip(*cells, strict=True)]
            lines.append(f"| {name} | " + " | ".join(both) + " |")
    if len(lines) == 2:
        raise SystemExit(f"kernel_figures: the step launches none of {', '.join(kernels)}")
    return "\n".join(lines) + "\n"


def main() -> None:
    reports = {gpu: report(gpu) for gpu in GPUS}
    text = PAGE.read_text()
    text = _TABLE.sub(lambda m: m[1] + table(reports, m[2].split()) + m[3], text)
    towers = report("h100", "--gpus", "2")
    text = _EXCHANGES.sub(lambda m: m[1] + exchanges(towers) + m[2], text)
    version = f"Triton {reports['h100']['triton']}, torch {reports['h100']['torch']}"
    text = _VERSION.sub(lambda m: m[1] + version + m[2], text)
    PAGE.write_text(text)
    filled = len(_TABLE.findall(text)) + len(_EXCHANGES.findall(text))
    print(f"filled {filled} tables of {PAGE}")


if __name__ == "__main__":
    main()
