"""What each launch of a step is worth on a GPU, with no GPU: ``python -m fastalex.roofline``.

The model's step runs on tensors without data; every kernel is compiled for the GPU and its machine
code read. Everything printed is computed, nothing is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import nn
from tqdm import tqdm

from fastalex.common.command_line import Parser, guarded
from fastalex.common.tables import table
from fastalex.inspection import cost, offline
from fastalex.inspection.forecast import Estimate
from fastalex.inspection.gpus import GPU, GPUS
from fastalex.inspection.record import PRECISIONS, Step, record_step
from fastalex.inspection.report import Row, inspect
from fastalex.model.variants import VARIANTS
from fastalex_kernels.common.backend import interpreted


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    return guarded("roofline", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    _check(options)
    if options.sass:
        print(machine_code(options))
        return 0
    report, rows = make_report(options)
    print(json.dumps(report, indent=1) if options.json else "\n".join(describe(report, rows)))
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m fastalex.roofline",
        description="Compile every launch of a step of AlexNet for a GPU that need not be here, "
        "and print what its machine code says, beside the least that the step can take.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h100", help="(default: %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=128, metavar="N", help="images of a step (128)"
    )
    parser.add_argument(
        "--gpus", type=int, choices=(1, 2), default=1, help="2: one of the two towers (default: 1)"
    )
    parser.add_argument(
        "--step",
        choices=("train", "infer"),
        default="train",
        help="train: forward, loss, backward, updates; infer: of these the forward passes, without "
        "dropout (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(PRECISIONS),
        default="bf16",
        help="of the products; parameters are float32 (default: %(default)s)",
    )
    parser.add_argument("--variant", choices=tuple(VARIANTS), default="paper")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="every figure, for machines")
    output.add_argument("--sass", metavar="KERNEL", help="print the machine code of one kernel")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raise a ValueError for what the command line can't show."""
    if options.batch < 1:
        raise ValueError(f"--batch: expected at least 1, got {options.batch}")
    if options.gpus > 1 and VARIANTS[options.variant].towers != options.gpus:
        raise ValueError(f"--gpus 2: variant {options.variant} has no two towers, use --gpus 1")
    if interpreted():
        raise ValueError("TRITON_INTERPRET=1 is set and kernels have no machine code, unset it")
    offline.check_target(GPUS[options.gpu].target)


def _recorded(options: argparse.Namespace) -> Step:
    target = GPUS[options.gpu].target
    given = options.batch, options.dtype, options.step, options.gpus, options.variant
    return record_step(target, *given)


def make_report(options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """Everything that is printed, as plain data, and its launches."""
    gpu, step = GPUS[options.gpu], _recorded(options)
    jobs = [[event.launch] for event in step.events if event.launch is not None]
    jobs.sort(key=lambda job: "lrn" not in job[0].name)  # the longest first
    compiled = offline.compile_ahead(jobs, gpu.target)
    for _ in tqdm(compiled, "compiling", len(jobs), unit=" kernels", leave=False, disable=None):
        pass
    rows = inspect(step, gpu, options.dtype)
    exchanges = _exchanges(step, rows)
    report = {
        "computed": "nothing here was timed",
        "gpu": dataclasses.asdict(gpu),
        "torch": torch.__version__,
        "triton": triton.__version__,
        **{name: getattr(options, name) for name in ("batch", "gpus", "step", "dtype", "variant")},
        "launches": [_as_json(row) for row in rows],
        "layers": _layers(rows),
        "exchanges": exchanges,
        "summary": _summary(step, rows, exchanges, gpu, options),
    }
    return report, rows


def _sum(rows: list[Row], *fields: str) -> float:
    return sum(getattr(row, field) or 0.0 for row in rows for field in fields)


def _layers(rows: list[Row]) -> list[dict[str, Any]]:
    """Bytes, operations and seconds of every layer, forward and backward, beside the floor's."""
    places: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        places.setdefault((row.layer, row.phase), []).append(row)
    return [
        {
            "layer": layer, "phase": phase, "launches": len(found),
            "size": _sum(found, "read", "written"),
            **{name: _sum(found, name) for name in _SUMMED},
        }
        for (layer, phase), found in places.items()
    ]  # fmt: skip


def _as_json(row: Row) -> dict[str, Any]:
    loop, estimate = row.loop, row.estimate
    shown = dataclasses.asdict(row)
    if loop is not None:
        shown["loop"] |= {"loaded": loop.loaded, "shared_ratio": loop.shared_ratio}
    return shown | {"estimate": None if estimate is None else estimate._asdict()}


def _estimates(rows: list[Row]) -> dict[str, float] | None:
    """Low, middle and high seconds of the rows together; None on a GPU that has no estimate."""
    made = [row.estimate for row in rows if row.estimate is not None]
    if len(made) < len(rows):
        return None
    return {name: sum(getattr(one, name) for one in made) for name in ("low", "middle", "high")}


def _summary(
    step: Step,
    rows: list[Row],
    exchanges: list[dict[str, Any]],
    gpu: GPU,
    options: argparse.Namespace,
) -> dict[str, Any]:
    parameters = sum(step.parameters)
    linear = [x.module for x in step.layers.values() if isinstance(x.module, nn.Linear)]
    update = cost.UPDATE_BYTES * parameters if options.step == "train" else 0
    update_floor = update / (1e12 * gpu.bandwidth)
    floor = _sum(rows, "floor") + update_floor
    waited = sum(exchange["waited"] for exchange in exchanges)
    ours = sum(row.grid is not None for row in rows)
    estimates = _estimates(rows)
    if estimates is not None:
        estimates = {name: seconds + waited for name, seconds in estimates.items()}
    return {
        "launches": len(rows),
        "our_launches": ours,
        "torch_launches": len(rows) - ours,
        "parameters": parameters,
        "linear_parameters": sum(p.numel() for layer in linear for p in layer.parameters()),
        "optimizer_bytes_per_parameter": _sum(rows, "updated") / parameters if update else None,
        "bytes": _sum(rows, "read", "written"),
        "floor_bytes": _sum(rows, "floor_size") + update,
        "loaded": sum(row.loop.loaded or 0 for row in rows if row.loop),
        "flops": _sum(rows, "flops"),
        "floor_flops": _sum(rows, "floor_flops"),
        "update_floor": update_floor,
        "floor": floor,
        # Two towers share the images of a step. The floor takes their exchange to be hidden.
        "ceiling_images_per_second": options.batch / floor,
        "waited": waited,
        "estimate": estimates,
    }


def _exchanges(step: Step, rows: list[Row]) -> list[dict[str, Any]]:
    """Each exchange of the towers: its seconds, those of what runs meanwhile, and what is left.

    By bytes alone: what it takes to start one is not known here.
    """
    result = []
    for one in step.exchanges:
        seconds = one.size / (1e12 * cost.LINK_BANDWIDTH)
        meanwhile = (_estimates(rows[one.started : one.ended]) or {"middle": 0.0})["middle"]
        result.append(
            {
                "layer": one.layer, "phase": one.phase, "size": one.size, "seconds": seconds,
                "meanwhile": meanwhile, "waited": max(0.0, seconds - meanwhile),
            }
        )  # fmt: skip
    return result


_SUMMED = ("flops", "floor_size", "floor_flops", "floor")
_TIMES = [
    "layer", "pass", "floor", "low", "mid", "high", "limit", "MB", "/floor", "L2 MB", "GFLOP",
    "smem",
]  # fmt: skip
_CODE = ["layer", "pass", "grid", "regs", "KB", "spills", "loads", "stores"]
_PRODUCTS = ["tile", "loop", "issue", "bars", "useful"]
_LEGEND = """\
pass: or the kernel that prepares or finishes one. floor: microseconds, at least, for the pass.
low, mid, high: estimates of this launch. limit: of the middle one. MB: every tensor once; a weight
that is updated counts, but not over the floor. L2 MB: what loops load. GFLOP: padding included.
smem: tensor cycles over shared-memory cycles of a turn. tile: rows x columns x warps of a program.
KB: shared memory. loads, stores: bytes of an access to what has 1% of the bytes. loop:
instructions of the loop with the products. issue: time to issue it over the time of its products.
bars: BAR.SYNC in a turn. useful: operations on real data over those done. instr: instructions of
all threads for an element of the input. More: docs/roofline.md."""


def _number(value: float | None, form: str = "d", scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale if scale != 1.0 else value, form)


def _over(value: float, floor: float | None) -> str:
    return f"{value / floor:.2f}" if floor and value else "-"


def _times(row: Row) -> list[str]:
    """A line of the first table."""
    moved, loop, made = row.read + row.written, row.loop, row.estimate
    estimates = ["-"] * 4 if made is None else [*(f"{1e6 * x:.1f}" for x in made[:3]), made.limit]
    return [
        row.layer,
        row.role or _short(row.name),
        _number(row.floor, ".1f", 1e6),
        *estimates,
        _number(moved, ".1f", 1e-6),
        _over(moved - row.updated, row.floor_size),
        _number(loop.loaded if loop else None, ".0f", 1e-6),
        _number(row.flops or None, ".1f", 1e-9),
        _number(loop.shared_ratio if loop else None, ".2f"),
    ]


def _code(row: Row) -> list[str]:
    """A line of the tables of machine code."""
    loop = row.loop
    common = [
        row.layer,
        row.role or _short(row.name),
        "x".join(map(str, row.grid or ())),
        _number(row.registers),
        _number(row.shared, ".0f", 1 / 1024),
        _number(row.spills),
        _widths(row.loads),
        _widths(row.stores),
    ]
    if loop is None:
        return [*common, _number(row.instructions, ".1f")]
    return [
        *common,
        "x".join(map(str, (*(row.tile or ()), row.warps))),
        str(loop.instructions),
        _number(loop.issue_ratio, ".2f"),
        str(loop.barriers),
        _number(row.useful, ".2f"),
    ]


def _widths(labels: list[str]) -> str:
    """The narrowest and the widest of some accesses."""
    return "-".join(dict.fromkeys((labels[0], labels[-1]))) if labels else "-"


def _short(name: str) -> str:
    return name.strip("_").removesuffix("_kernel")


def _without_operators(rows: list[Row]) -> list[Row]:
    """The rows, neighbouring operators of torch's in a layer made one."""
    result: list[Row] = []
    for row in rows:
        before = result[-1] if result else None
        name = row.name.removeprefix("aten.").strip("_")
        if row.grid is not None:
            result.append(row)
        elif before and before.grid is None and before.layer == row.layer:
            result[-1] = dataclasses.replace(
                before, name=f"{before.name}, {name}", read=before.read + row.read,
                written=before.written + row.written,
                estimate=Estimate.joined(before.estimate, row.estimate),
            )  # fmt: skip
        else:
            result.append(dataclasses.replace(row, name=f"torch: {name}"))
    return result


def describe(report: dict[str, Any], rows: list[Row]) -> list[str]:
    """The report as text, at most 100 columns wide."""
    gpu = report["gpu"]
    launches = [row for row in rows if row.grid is not None]
    towers = "one tower of two" if report["gpus"] == 2 else "one GPU"
    lines = [
        f"AlexNet ({report['variant']}), {report['step']} step, batch {report['batch']}, "
        f"{report['dtype']}, {towers}, {gpu['name']} ({gpu['target']}), triton {report['triton']}",
        "Computed from machine code; nothing was timed.",
        "",
        *table([_TIMES, *map(_times, _without_operators(rows))], right=10),
        "",
        *table([[*_CODE, *_PRODUCTS], *(_code(row) for row in launches if row.loop)], right=10),
        "",
        *table([[*_CODE, "instr"], *(_code(row) for row in launches if not row.loop)], right=6),
        "",
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
    return [*lines, *_totals(report["summary"], gpu, report["batch"]), "", _LEGEND]


def _totals(total: dict[str, Any], gpu: dict[str, Any], batch: int) -> list[str]:
    update, made = total["optimizer_bytes_per_parameter"], total["estimate"]
    lines = [
        f"launches a step: {total['launches']} ({total['our_launches']} ours, "
        f"{total['torch_launches']} of torch's operators)",
        f"bytes: {total['bytes'] / 1e6:.0f} MB, floor {total['floor_bytes'] / 1e6:.0f} MB "
        f"({total['bytes'] / total['floor_bytes']:.2f}); through L2 {total['loaded'] / 1e6:.0f} MB",
        f"floor: {total['floor'] * 1e6:.0f} us, {total['ceiling_images_per_second']:,.0f} images/s "
        f"at {gpu['tflops']:g} TFLOP/s bf16 and {gpu['bandwidth']:g} TB/s",
    ]
    if update is not None:
        lines.insert(2, f"update: {update:.1f} bytes a parameter, floor {cost.UPDATE_BYTES}")
    if made is None:
        return [*lines, f"estimate: none, the rates of L2 are not known for {gpu['name']}"]
    spread = [f"{made[name] * 1e6:.0f}" for name in ("middle", "low", "high")]
    images = [f"{batch / made[name]:,.0f}" for name in ("middle", "high", "low")]
    waiting = f", {total['waited'] * 1e6:.0f} us of it waiting" if total["waited"] else ""
    return [
        *lines,
        f"estimate, unmeasured: {spread[0]} us ({spread[1]} to {spread[2]}{waiting}), {images[0]} "
        f"images/s ({images[1]} to {images[2]})",
    ]


def machine_code(options: argparse.Namespace) -> str:
    """The machine code of every variant of a kernel in the step.

    Raises:
        ValueError: where the step launches no kernel of that name.
    """
    gpu, step = GPUS[options.gpu], _recorded(options)
    events = [event for event in step.events if event.launch is not None]
    found = [event for event in events if _short(event.name) == _short(options.sass)]
    if not found:
        names = sorted({_short(event.name) for event in events})
        raise ValueError(f"--sass: no kernel {options.sass!r} here, there are {', '.join(names)}")
    parts: dict[int, tuple[list[str], str]] = {}
    for event in found:
        assert event.launch is not None
        compiled = offline.compile_launch(event.launch, gpu.target)
        where = f"{event.layer} {event.phase} {event.launch.grid}"
        parts.setdefault(id(compiled), ([], offline.read(compiled).assembly))[0].append(where)
    return "\n".join(f"// {', '.join(where)}\n{code}" for where, code in parts.values())
