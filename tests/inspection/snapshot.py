"""What the machine code of a training step shows, at AlexNet's sizes, and its bars.

``snapshot.json`` holds the figures of every launch. A figure may get better; one that gets worse
by more than the tolerance, or misses a bar without a reason in ``MISSED``, is a failure. After a
change that is meant:

    python -m tests.inspection.snapshot --update

writes the figures, and the page of the bars that they miss; with --page the page alone, of the
figures that are there.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import triton

from fastalex.inspection import roofline
from fastalex.inspection.gpus import GPU, GPUS

PATH = Path(__file__).with_name("snapshot.json")
PAGE = Path(__file__).parents[2] / "docs" / "generated" / "bars.md"
CASES = {
    f"{gpu} {'tower' if gpus == 2 else 'whole'} {batch}": (gpu, gpus, batch)
    for gpu in ("h100", "a100", "b200", "rtx5090")
    for gpus, batch in ((1, 128), (1, 1024), (2, 128))
    if gpu in ("h100", "a100") or (gpus, batch) == (1, 128)
}
TOLERANCE = 0.02
HIGHER = {"useful", "intensity", "smem"}  # is better; of anything else, lower
Figures = dict[str, dict[str, float]]  # of each launch, and of the step


class Bar(NamedTuple):
    """What a figure of some launches has to reach.

    Args:
        figure: its name.
        limit: the least, or the most.
        what: matches the start of the launches' names.
        case: matches the start of the cases' names.
    """

    figure: str
    limit: float
    what: str = ""
    case: str = ""

    def holds(self, figure: str, what: str, case: str) -> bool:
        """Whether it is a bar for a figure of a launch in a case."""
        return (
            figure == self.figure
            and re.match(self.what, what) is not None
            and re.match(self.case, case) is not None
        )

    def missed(self, figure: str, what: str, case: str, value: float) -> bool:
        """Whether it is a bar for the figure, and ``value`` misses it."""
        return self.holds(figure, what, case) and _worse(figure, value, self.limit, 0.0)

    def __str__(self) -> str:
        return f"{self.figure} {'>=' if self.figure in HIGHER else '<='} {self.limit:.4g}"


BARS = [
    Bar("spills", 0),
    Bar("register loads", 0),
    Bar("drains", 0),
    Bar("fences", 0),
    Bar("issue", 0.80, "conv1"),
    Bar("issue", 0.40, "conv[2-5]|fc"),
    Bar("useful", 0.93, "conv[2-5] forward"),
    Bar("useful", 0.7499, "conv2 input"),
    Bar("useful", 0.72, "conv1"),
    # 800 TFLOP/s over 8.1 TB/s from L2, and 270 over 4.2.
    Bar("intensity", 99, "conv(?!2 input)", "h100"),
    Bar("intensity", 85, "conv2 input", "h100"),
    Bar("intensity", 64, "conv", "a100"),
    Bar("smem", 0.75, "conv", "h100|b200|rtx"),
    Bar("barriers", 1, "conv", "h100|b200|rtx"),
    Bar("repeated", 1.001),
    Bar("instructions", 16, "pool[12] forward"),
    Bar("instructions", 36, "pool[12] backward"),
    Bar("bytes over floor", 1.10, "pool[12]"),
    Bar("bytes over floor", 1.05, "fc6 fc7 fc8"),
    Bar("bytes a parameter", 18.005, "step"),
    Bar("launches", 45, "step"),
]
MISSED = {  # (figure, launches, or "launches on case"): why it misses its bar
    ("issue", "conv2 forward"): "48 channels are taken 16 at a time, which makes short products",
    ("issue", "fc. (weight|backward)"): "two steps a weight at batch 128: bound by bytes",
    ("issue", "conv3 forward on h100 tower .*"): "its first rows are narrow blocks, all at once",
    ("smem", "conv3 forward on h100 tower .*"): "its first rows are narrow blocks, all at once",
    ("drains", "fc. backward"): "the sums of a turn are used in it, while others are loaded",
    ("fences", "fc. backward"): "what a turn made leaves through shared memory",
    ("issue", "fc8 input"): "a sum of 1000 is masked in its last block, and so in every one",
    ("issue", "conv2 input"): "products of 32 and of 16 columns are short, and each has its own "
    "copy of x in registers",
    ("useful", "conv2 forward"): "a pair's 28th pixel in a line of 27, and taps at the line's ends",
    ("fences", "conv[12] (forward|input)"): "x is read into registers: the fence between that and "
    "the next copies is also a memory barrier, once a turn",
    ("useful", "conv2 input"): "taps that one of two neighbouring pixels lacks are zeros, and "
    "they are 96 of 128 columns",
    ("useful", "conv1 weight"): "48 channels in 64 rows, 96 outputs in 128 columns",
    ("intensity", "conv2 input"): "on sm_80 48 outputs in 64",
    ("intensity", "conv.*"): "each tap loads x again; three pixels of 128 columns come to 96",
    ("smem", "conv1 (forward|weight)"): "48 channels, or a tower's 48 outputs, in 64",
    (
        "barriers",
        "conv[12] (forward|input) on h100.*",
    ): "each wait for products ends in a barrier of the multiplying warps",
    ("barriers", "conv.*"): "no warp of its own loads: each turn ends in barriers of all warps",
    ("instructions", "pool[12] forward"): "a program computes one row more than it keeps, of few",
    ("instructions", "pool[12] backward"): "two windows are loaded before the first of few rows",
    ("bytes over floor", "pool2 backward on .* tower .*"): "the gradient is read in two parts, "
    "which nobody adds before",
    ("bytes over floor", "fc6 fc7 fc8"): "float32 sums of split products, stored and read",
    (
        "issue",
        ".* on b200.*",
    ): "tcgen05 makes the products of a turn in half of wgmma's cycles, and "
    "as many instructions are issued by all warps",
    ("smem", "conv.* on b200.*"): "a product of 128 x 128 takes all of the 128 bytes a cycle; "
    "tl.dot makes no pairs of programs, which would share the columns",
    ("launches", "step"): "the exchange by torch, whose halves are put together apart",
}

INTRODUCTION = """\
# The bars, and what misses them

`python -m tests.inspection.snapshot --update` writes this page from the figures and the reasons
that the tests hold (Triton {triton}): a training step in bfloat16, read from machine code. Nothing
was timed.

| figure | means |
|---|---|
| issue, useful, smem, instructions | [the report](../roofline.md#columns)'s |
| register loads | loads of the loop with the products that go through registers |
| drains, fences | that loop's waits for all products, and its MEMBARs |
| barriers | for 256 cycles of products |
| intensity | operations of a turn over the bytes that it loads |
| repeated | products made over those meant |

H100 is sm_90, A100 sm_80, B200 sm_100, RTX5090 sm_120; 1024 is the batch where it is not 128; a
tower is one of two.

## Every bar

A cell has how many launches miss the bar, of those that it is for. None is for an empty cell.
Launches are those whose name begins with the expression.
"""


def measure(case: str) -> Figures:
    """The figures of a case, from the roofline report."""
    gpu, gpus, batch = CASES[case]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        options = ["--gpu", gpu, "--gpus", str(gpus), "--batch", str(batch), "--json"]
        assert roofline.main(options) == 0
    report = json.loads(output.getvalue())
    found: Figures = {}
    for row in report["launches"]:
        if row["grid"] is None:
            continue
        kernel = row["name"].strip("_").removesuffix("_kernel")
        name = f"{row['layer']} {row['role'] or row['phase'] + ' ' + kernel}"
        figures = found.setdefault(name, {})
        for key, value in _of(row, GPUS[gpu]).items():
            worst = min if key in HIGHER else max
            figures[key] = worst(value, figures.get(key, value))
    summary = report["summary"]
    for layer, phase in itertools.product(("pool1", "pool2"), ("forward", "backward")):
        rows = [r for r in report["launches"] if (r["layer"], r["phase"]) == (layer, phase)]
        found[f"{layer} {phase}"]["bytes over floor"] = _moved(rows) / _floor(rows)
    linear = [row for row in report["launches"] if row["layer"].startswith("fc")]
    floor = _floor(linear) + 18 * summary["linear_parameters"]
    found["fc6 fc7 fc8"] = {"bytes over floor": _moved(linear) / floor}
    found["step"] = {
        "launches": summary["launches"],
        "bytes a parameter": summary["optimizer_bytes_per_parameter"],
        "bytes over floor": summary["bytes"] / summary["floor_bytes"],
    }
    if summary["estimate"]:
        found["step"]["estimate us"] = 1e6 * summary["estimate"]["middle"]
    return found


def _moved(rows: list[dict[str, Any]]) -> float:
    return float(sum(row["read"] + row["written"] for row in rows))


def _floor(rows: list[dict[str, Any]]) -> float:
    return float(sum(row["floor_size"] or 0.0 for row in rows))


def _of(row: dict[str, Any], gpu: GPU) -> dict[str, float]:
    figures = {"registers": row["registers"], "spills": row["spills"]}
    loop = row["loop"]
    if loop is None:
        return {**figures, "instructions": row["instructions"]} if row["instructions"] else figures
    figures |= {
        "issue": loop["issue_ratio"], "drains": loop["drains"], "smem": loop["shared_ratio"],
        "barriers": 256 * loop["barriers"] / loop["tensor_cycles"],  # for 256 cycles of products
        "register loads": loop["register_loads"], "useful": row["useful"],
        "intensity": loop["turn_flops"] / loop["turn_bytes"],
        # Two warps may each make a product that the intermediate code has once.
        "repeated": loop["tensor_cycles"] * gpu.tensor_flops / loop["turn_flops"],
    }  # fmt: skip
    if "TMA" in row["loads"]:
        figures["fences"] = loop["fences"]
    return {name: value for name, value in figures.items() if value is not None}


def failures(found: Figures, held: Figures, case: str) -> list[str]:
    """What is worse than it was, or misses a bar for no known reason."""
    result = []
    for what, figures in found.items():
        for name, value in figures.items():
            before = held.get(what, {}).get(name)
            if before is not None and _worse(name, value, before, TOLERANCE):
                result.append(f"{what}: {name} {value:.4g}, was {before:.4g}")
            for bar in BARS:
                if bar.missed(name, what, case, value) and not _why(name, what, case):
                    result.append(f"{what}: {name} {value:.4g} misses the bar {bar.limit:g}")
    return [*result, *(f"{what}: is not launched" for what in held if what not in found)]


def _worse(name: str, value: float, limit: float, tolerance: float) -> bool:
    if name in HIGHER:
        return value < limit * (1 - tolerance)
    return value > limit * (1 + tolerance)


def _why(name: str, what: str, case: str) -> str | None:
    found = (why for (f, w), why in MISSED.items() if f == name and _is(w, what, case))
    return next(found, None)


def _is(pattern: str, what: str, case: str) -> bool:
    return any(re.fullmatch(pattern, each) for each in (what, f"{what} on {case}"))


def page(held: dict[str, Figures], triton_version: str) -> str:
    """Every bar with what misses it, its figures and the reason, in Markdown."""
    bars: list[list[str]] = []
    missed: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for bar in BARS:
        bars.append([str(bar), f"`{bar.what}`".replace("|", "\\|") if bar.what else "all"])
        for case, found in held.items():
            of = [w for w, f in found.items() if bar.figure in f and bar.holds(bar.figure, w, case)]
            below = [w for w in of if bar.missed(bar.figure, w, case, found[w][bar.figure])]
            bars[-1].append(f"{len(below)} of {len(of)}" if of else "")
            for what in below:
                launches = missed.setdefault((str(bar), _why(bar.figure, what, case) or ""), {})
                launches.setdefault(what, {})[case] = f"{found[what][bar.figure]:.4g}"
    parts = [INTRODUCTION.format(triton=triton_version)]
    parts += [_table(["bar", "launches", *map(_title, held)], bars), "## Every miss\n"]
    for (name, why), launches in missed.items():
        cases = [case for case in held if any(case in values for values in launches.values())]
        rows = [[w, *(values.get(case, "") for case in cases)] for w, values in launches.items()]
        parts += [f"**{name}**: {why}.\n", _table(["launch", *map(_title, cases)], rows)]
    return "\n".join(parts)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def _title(case: str) -> str:
    gpu, gpus, batch = CASES[case]
    return gpu.upper() + (" tower" if gpus == 2 else "") + ("" if batch == 128 else f", {batch}")


def _shown(content: Any, depth: int = 0) -> str:
    """JSON with a launch on a line."""
    if not isinstance(content, dict) or not any(isinstance(x, dict) for x in content.values()):
        return json.dumps(content)
    space = "\n" + " " * (depth + 1)
    lines = [f"{json.dumps(name)}: {_shown(x, depth + 1)}" for name, x in content.items()]
    return f"{{{space}{f',{space}'.join(lines)}\n{' ' * depth}}}"


def main() -> None:
    """Write the snapshot, or with no option say what is worse than in it."""
    if "--page" in sys.argv:
        kept = json.loads(PATH.read_text())
        PAGE.write_text(page(kept["cases"], kept["triton"]))
        return
    cases = {case: measure(case) for case in CASES}
    if "--update" in sys.argv:
        rounded = {
            case: {w: {n: round(v, 4) for n, v in f.items()} for w, f in found.items()}
            for case, found in cases.items()
        }
        content = {"triton": triton.__version__, "cases": rounded}
        PATH.write_text(_shown(content) + "\n")
        PAGE.write_text(page(rounded, triton.__version__))
        return
    held = json.loads(PATH.read_text())["cases"]
    for case in CASES:
        for line in failures(cases[case], held[case], case):
            print(f"{case}: {line}")


if __name__ == "__main__":
    main()
