"""What each launch of a step is worth on a GPU, with no GPU: ``python -m fastalex.roofline``.

The model's step runs on tensors without data; every kernel is compiled for the GPU and its machine
code read. Everything printed is computed, nothing is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import nn
from tqdm import tqdm

from fastalex.common.command_line import Parser, guarded
from fastalex.common.compile import check_target, compile_ahead, compile_launch
from fastalex.common.tables import table
from fastalex.inspection import cost, offline
from fastalex.inspection.gpus import GPU, GPUS
from fastalex.inspection.record import PRECISIONS, Step, record_step
from fastalex.inspection.report import Row, inspect
from fastalex.model.variants import VARIANTS
from fastalex.training.optim import BUFFERS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    return guarded("roofline", lambda: _run(options))


def _parser() -> Parser:
    parser = Parser(
        prog="python -m fastalex.roofline",
        description="Compile every launch of a step of AlexNet for a GPU that need not be here, "
        "and print what its machine code says, beside the least that the step can take.",
    )
    parser.add_choice("--gpu", GPUS, "h100")
    parser.add_count("--batch", "images of a step", 128)
    parser.add_choice("--gpus", (1, 2), 1, "2: one of the two towers")
    text = "train: forward, loss, backward, updates; infer: of these the forward passes, without "
    parser.add_choice("--step", ("train", "infer"), "train", text + "dropout")
    parser.add_choice("--dtype", PRECISIONS, "bf16", "of the products; parameters are float32")
    parser.add_choice("--variant", VARIANTS, "paper")
    parser.add_choice("--momentum-dtype", BUFFERS, "float32", "of the momentum buffers")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="every figure, for machines")
    output.add_argument("--sass", metavar="KERNEL", help="print the machine code of one kernel")
    return parser


def _run(options: argparse.Namespace) -> int:
    gpu = GPUS[options.gpu]
    if options.gpus > 1 and VARIANTS[options.variant].towers != options.gpus:
        raise ValueError(f"--gpus 2: variant {options.variant} has no two towers, use --gpus 1")
    case = Case(
        options.batch, options.dtype, options.step, options.gpus, options.variant,
        options.momentum_dtype,
    )  # fmt: skip
    if options.sass:
        print(machine_code(_recorded(gpu, case), gpu, options.sass))
        return 0
    report, rows = make_report(gpu, case)
    print(json.dumps(report, indent=1) if options.json else "\n".join(describe(report, rows)))
    return 0


class Case(NamedTuple):
    """Which step is reported, as ``record_step`` takes it; ``gpus`` 2 is one of the two towers."""

    batch: int
    dtype: str = "bf16"
    step: str = "train"
    gpus: int = 1
    variant: str = "paper"
    momentum_dtype: str = "float32"


def _recorded(gpu: GPU, case: Case) -> Step:
    check_target(gpu.target)
    return record_step(gpu.target, *case)


def make_report(gpu: GPU, case: Case) -> tuple[dict[str, Any], list[Row]]:
    """Everything that is known of a step, as plain data, and its launches.

    They are compiled on all cores, with a bar.

    Raises:
        ValueError: where nothing can be compiled for the GPU, or the step can't be recorded.
    """
    step = _recorded(gpu, case)
    jobs = [[event.launch] for event in step.events if event.launch is not None]
    jobs.sort(key=lambda job: "lrn" not in job[0].name)  # the longest first
    compiled = compile_ahead(jobs, gpu.target)
    for _ in tqdm(compiled, "compiling", len(jobs), unit=" kernels", leave=False, disable=None):
        pass
    rows = inspect(step, gpu, case.dtype)
    exchanges = _exchanges(step, rows)
    report = {
        "computed": "nothing here was timed",
        "gpu": dataclasses.asdict(gpu),
        "torch": torch.__version__,
        "triton": triton.__version__,
        **case._asdict(),
        "launches": [
            {**dataclasses.asdict(row), "estimate": row.estimate and row.estimate._asdict()}
            for row in rows
        ],
        "exchanges": exchanges,
        "summary": _summary(step, rows, gpu, sum(one["waited"] for one in exchanges), case),
    }
    return report, rows


def _sum(rows: list[Row], *fields: str) -> float:
    return sum(getattr(row, field) or 0.0 for row in rows for field in fields)


def _estimates(rows: list[Row], waited: float) -> dict[str, float] | None:
    """Low, middle and high seconds of the rows together; None on a GPU that has no estimate."""
    made = [row.estimate for row in rows if row.estimate is not None]
    if len(made) < len(rows):
        return None
    names = ("low", "middle", "high")
    return {name: sum(getattr(one, name) for one in made) + waited for name in names}


def _summary(step: Step, rows: list[Row], gpu: GPU, waited: float, case: Case) -> dict[str, Any]:
    linear = [x.module for x in step.layers.values() if isinstance(x.module, nn.Linear)]
    update = cost.UPDATE_BYTES * step.parameters if case.step == "train" else 0
    if update and case.momentum_dtype == "bf16":
        update -= 4 * sum(layer.weight.numel() for layer in linear)
    floor = _sum(rows, "floor") + update / (1e12 * gpu.bandwidth)
    ours = sum(row.grid is not None for row in rows)
    updated = _sum(rows, "updated")
    return {
        "launches": len(rows),
        "our_launches": ours,
        "torch_launches": len(rows) - ours,
        "early_launches": sum(row.starts_early for row in rows),
        "linear_parameters": sum(p.numel() for layer in linear for p in layer.parameters()),
        "optimizer_bytes_per_parameter": updated / step.parameters if update else None,
        "floor_of_the_update": update / step.parameters,
        "bytes": _sum(rows, "read", "written"),
        "floor_bytes": _sum(rows, "floor_size") + update,
        "loaded": sum(row.loop.loaded or 0 for row in rows if row.loop),
        "floor": floor,
        # Two towers share the images of a step. The floor takes their exchange to be hidden.
        "ceiling_images_per_second": case.batch / floor,
        "waited": waited,
        "estimate": _estimates(rows, waited),
    }


def _exchanges(step: Step, rows: list[Row]) -> list[dict[str, Any]]:
    """Each exchange of the towers: its seconds, those of what runs meanwhile, and what is left.

    By bytes alone: what it takes to start one is not known here.
    """
    result = []
    for one in step.exchanges:
        seconds = one.size / (1e12 * cost.LINK_BANDWIDTH)
        between = _estimates(rows[one.started : one.ended], 0.0)
        meanwhile = between["middle"] if between else 0.0
        times = {
            "seconds": seconds,
            "meanwhile": meanwhile,
            "waited": max(0.0, seconds - meanwhile),
        }
        result.append({"layer": one.layer, "phase": one.phase, "size": one.size, **times})
    return result


Columns = dict[str, Callable[[Row], str]]


def _number(value: float | None, form: str = "d", scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale if scale != 1.0 else value, form)


def _of_estimate(name: str) -> Callable[[Row], str]:
    return lambda row: _number(getattr(row.estimate, name, None), ".1f", 1e6)


def _of_loop(name: str, form: str = "d", scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: _number(getattr(row.loop, name, None), form, scale)


def _over_floor(row: Row) -> str:
    moved = row.read + row.written - row.updated
    return f"{moved / row.floor_size:.2f}" if row.floor_size and moved else "-"


def _short(name: str) -> str:
    return name.strip("_").removesuffix("_kernel").replace("aten.", "torch: ")


_PASS: Columns = {
    "layer": lambda row: row.layer,
    "pass": lambda row: row.role or _short(row.name),
}
_TIMES: Columns = {
    **_PASS,
    "floor": lambda row: _number(row.floor, ".1f", 1e6),
    "low": _of_estimate("low"),
    "mid": _of_estimate("middle"),
    "high": _of_estimate("high"),
    "limit": lambda row: row.estimate.limit if row.estimate else "-",
    "MB": lambda row: _number(row.read + row.written, ".1f", 1e-6),
    "/floor": _over_floor,
    "L2 MB": _of_loop("loaded", ".0f", 1e-6),
    "GFLOP": lambda row: _number(row.flops or None, ".1f", 1e-9),
    "smem": _of_loop("shared_ratio", ".2f"),
}
_CODE: Columns = {
    **_PASS,
    "grid": lambda row: "x".join(map(str, row.grid or ())),
    "regs": lambda row: _number(row.registers),
    "KB": lambda row: _number(row.shared, ".0f", 1 / 1024),
    "spills": lambda row: _number(row.spills),
    "loads": lambda row: ",".join(row.loads) or "-",
    "stores": lambda row: ",".join(row.stores) or "-",
}
_PRODUCTS: Columns = {
    **_CODE,
    "tile": lambda row: "x".join(map(str, (*(row.tile or ()), row.warps))),
    "loop": _of_loop("instructions"),
    "issue": _of_loop("issue_ratio", ".2f"),
    "bars": _of_loop("barriers"),
    "useful": lambda row: _number(row.useful, ".2f"),
}
_OTHERS: Columns = {**_CODE, "instr": lambda row: _number(row.instructions, ".1f")}
_LEGEND = """\
pass: or the kernel that prepares or finishes one. floor: microseconds, at least, for the pass.
low, mid, high: estimates of this launch. limit: of the middle one. MB: every tensor once; a weight
that is updated counts, but not over the floor. L2 MB: what loops load. GFLOP: padding included.
smem: tensor cycles over shared-memory cycles of a turn. tile: rows x columns x warps of a program.
KB: shared memory. loads, stores: bytes of an access, the most frequent first. loop:
instructions of the loop with the products. issue: time to issue it over the time of its products.
bars: BAR.SYNC in a turn. useful: operations on real data over those done. instr: instructions of
all threads for an element of the input. More: docs/roofline.md."""


def _table(columns: Columns, rows: list[Row], left: int) -> list[str]:
    cells = [[cell(row) for cell in columns.values()] for row in rows]
    return [*table([list(columns), *cells], right=len(columns) - left), ""]


def describe(report: dict[str, Any], rows: list[Row]) -> list[str]:
    """The report as text, at most 100 columns wide."""
    gpu = report["gpu"]
    launches = [row for row in rows if row.grid is not None]
    towers = "one tower of two" if report["gpus"] == 2 else "one GPU"
    momentum = "" if report["momentum_dtype"] == "float32" else ", momentum in bf16"
    lines = [
        f"AlexNet ({report['variant']}), {report['step']} step, batch {report['batch']}, "
        f"{report['dtype']}{momentum}, {towers}, {gpu['name']} ({gpu['target']}), "
        f"triton {report['triton']}",
        "Computed from machine code; nothing was timed.",
        "",
        *_table(_TIMES, rows, left=2),
        *_table(_PRODUCTS, [row for row in launches if row.loop], left=3),
        *_table(_OTHERS, [row for row in launches if not row.loop], left=3),
    ]
    if report["exchanges"]:
        head = ["layer", "pass", "MB each way", "exchange us", "meanwhile us", "waited us"]
        exchanges = [
            [one["layer"], one["phase"], f"{one['size'] / 1e6:.2f}"]
            + [f"{one[name] * 1e6:.1f}" for name in ("seconds", "meanwhile", "waited")]
            for one in report["exchanges"]
        ]
        lines += [*table([head, *exchanges], right=4)]
        lines += [f"(each direction at {cost.LINK_BANDWIDTH:g} TB/s)", ""]
    return [*lines, *_totals(report), "", _LEGEND]


def _totals(report: dict[str, Any]) -> list[str]:
    total, gpu, batch = report["summary"], report["gpu"], report["batch"]
    update, made = total["optimizer_bytes_per_parameter"], total["estimate"]
    lines = [
        f"launches a step: {total['launches']} ({total['our_launches']} ours, "
        f"{total['torch_launches']} of torch's operators); {total['early_launches']} start early",
        f"bytes: {total['bytes'] / 1e6:.0f} MB, floor {total['floor_bytes'] / 1e6:.0f} MB "
        f"({total['bytes'] / total['floor_bytes']:.2f}); through L2 {total['loaded'] / 1e6:.0f} MB",
        f"floor: {total['floor'] * 1e6:.0f} us"
        + (f", {total['ceiling_images_per_second']:,.0f} images/s" if made else "")
        + f" at {gpu['tflops']:g} TFLOP/s bf16 and {gpu['bandwidth']:g} TB/s",
    ]
    if update is not None:
        least = total["floor_of_the_update"]
        lines.insert(2, f"update: {update:.1f} bytes a parameter, floor {least:.3g}")
    if made is None:
        return [*lines, f"estimate: none, the rates of L2 are not known for {gpu['name']}"]
    us = {name: f"{seconds * 1e6:.0f}" for name, seconds in made.items()}
    images = {name: f"{batch / seconds:,.0f}" for name, seconds in made.items()}
    waiting = f", {total['waited'] * 1e6:.0f} us of it waiting" if total["waited"] else ""
    return [
        *lines,
        f"estimate, unmeasured: {us['middle']} us ({us['low']} to {us['high']}{waiting}), "
        f"{images['middle']} images/s ({images['high']} to {images['low']})",
    ]


def machine_code(step: Step, gpu: GPU, kernel: str) -> str:
    """The machine code of every variant of a kernel in the step.

    Raises:
        ValueError: where the step launches no kernel of that name.
    """
    launches = [event.launch for event in step.events if event.launch is not None]
    places: dict[str, list[str]] = {}  # of each code
    for launch in launches:
        if _short(launch.name) == _short(kernel):
            code = offline.read(compile_launch(launch, gpu.target)).assembly
            places.setdefault(code, []).append(f"{launch.layer} {launch.phase} {launch.grid}")
    if not places:
        names = ", ".join(sorted({_short(launch.name) for launch in launches}))
        raise ValueError(f"--sass: no kernel {kernel!r} here, there are {names}")
    return "\n".join(f"// {', '.join(where)}\n{code}" for code, where in places.items())
