"""Write docs/generated/kernels.md from the roofline report; no GPU is needed.

    python docs/kernel_figures.py

A row is a launch of a training step; a cell holds the H100's figure and the A100's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

GPUS = ("h100", "a100")
PAGE = Path(__file__).parent / "generated" / "kernels.md"
KERNELS = {
    "Convolution, forward and input gradient": "conv2d_relu_fwd conv2d_bwd_input",
    "Convolution, weight gradient": "conv2d_bwd_weight",
    "LRN and max-pooling": "lrn_max_pool2d",
    "Fully connected, forward and input gradient": "linear_relu_dropout finish_partials",
    "Cross-entropy": "cross_entropy",
    "Fully connected, both gradients and the update in one pass": "linear_bwd_kernel",
    "Weight gradients and updates": "linear_bwd_weight_update sum_update",
    "Augmentation": "augment",
}
HEAD = (
    "launch", "grid", "tile, warps", "registers", "shared KB", "loop", "issue", "barriers",
    "useful", "smem", "instr", "MB", "over floor", "L2 MB", "floor us", "estimate us",
)  # fmt: skip
INTRODUCTION = """\
# Each launch of a training step, read without a GPU

`python docs/kernel_figures.py` writes this page from `python -m fastalex.roofline --gpu h100`
and the same for `a100`, at a batch of 128 (Triton {triton}, torch {torch}). Where the two GPUs
differ, a cell is "H100 / A100". Nothing here was timed; estimates are middle (low-high).
[roofline.md](../roofline.md) explains the columns.
"""
EXCHANGES = """\
## Exchanges between two towers

Two H100s, batch 128, the same images on both. Computed from bytes at an assumed 0.37 TB/s in each
direction (`python -m fastalex.roofline --gpu h100 --gpus 2`). The time to start a copy is not
included.
"""


def report(gpu: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "fastalex.roofline", "--gpu", gpu, "--batch", "128", "--json"]
    command += options
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _cells(row: dict[str, Any]) -> list[str]:
    moved = row["read"] + row["written"] - row["updated"]
    tile = "" if row["tile"] is None else "x".join(map(str, row["tile"])) + f", {row['warps']}"
    loop = row["loop"] or dict.fromkeys(
        ("instructions", "issue_ratio", "barriers", "shared_ratio", "loaded")
    )
    made, loaded = row["estimate"], loop["loaded"]
    return [
        f"{row['layer']} {row['role'] or row['phase']}",
        "x".join(map(str, row["grid"])),
        tile,
        str(row["registers"]),
        _number(round((row["shared"] or 0) / 1024, 1), "g"),
        _number(loop["instructions"], "d"),
        _number(loop["issue_ratio"]),
        _number(loop["barriers"], "d"),
        _number(row["useful"]),
        _number(loop["shared_ratio"]),
        "" if row["flops"] else _number(row["instructions"], ".1f"),
        _number((row["read"] + row["written"]) / 1e6, ".1f"),
        _number(moved / row["floor_size"]) if row["floor_size"] and moved else "",
        _number(loaded and loaded / 1e6, ".0f"),
        _number(row["floor"] and 1e6 * row["floor"], ".1f"),
        f"{1e6 * made['middle']:.1f} ({1e6 * made['low']:.1f}-{1e6 * made['high']:.1f})",
    ]


def _table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def _launches(reports: list[dict[str, Any]], names: str) -> list[list[str]]:
    """The rows of all launches of some kernels, in the order of the step."""
    kernels = tuple(names.split())
    found: dict[tuple[str, int], dict[str, list[str]]] = {}
    for gpu, made in zip(GPUS, reports, strict=True):
        counts: Counter[str] = Counter()
        for row in made["launches"]:
            if row["name"].strip("_").startswith(kernels):
                cells = _cells(row)
                counts[cells[0]] += 1
                found.setdefault((cells[0], counts[cells[0]]), {})[gpu] = cells
    rows = []
    for by_gpu in found.values():
        if len(by_gpu) < len(GPUS):  # the other one launches something else
            ((gpu, (label, *cells)),) = by_gpu.items()
            rows.append([f"{label} ({gpu.upper()})", *cells])
        else:
            pairs = zip(*by_gpu.values(), strict=True)
            rows.append([a if a == b else f"{a} / {b}" for a, b in pairs])
    return rows


def _exchanges(report: dict[str, Any]) -> list[list[str]]:
    return [
        [one["layer"], one["phase"], f"{one['size'] / 1e6:.2f}"]
        + [f"{one[name] * 1e6:.1f}" for name in ("seconds", "meanwhile", "waited")]
        for one in report["exchanges"]
    ]


def main() -> None:
    reports = [report(gpu) for gpu in GPUS]
    parts = [INTRODUCTION.format(**reports[0])]
    for title, names in KERNELS.items():
        parts += [f"## {title}\n", _table(HEAD, _launches(reports, names))]
    head = ("before", "pass", "MB each way", "exchange us", "meanwhile us", "waited us")
    parts += [EXCHANGES, _table(head, _exchanges(report("h100", "--gpus", "2")))]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(parts))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
