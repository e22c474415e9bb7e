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
        "launches": [dataclasses.asdict(row) for row in rows],
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
    return {
        "launches": len(rows),
        "our_launches": ours,
        "torch_launches": len(rows) - ours,
        "parameters": parameters,
        "linear_parameters": sum(p.numel() for layer in linear for p in layer.parameters()),
        "optimizer_bytes_per_parameter": _sum(rows, "updated") / parameters if update else None,
        "bytes": _sum(rows, "read", "written"),
        "floor_bytes": _sum(rows, "floor_size") + update,
        "flops": _sum(rows, "flops"),
        "floor_flops": _sum(rows, "floor_flops"),
        "update_floor": update_floor,
        "floor": floor,
        "bound": _sum(rows, "bound"),
        # Two towers share the images of a step. The floor takes their exchange to be hidden.
        "ceiling_images_per_second": options.batch / floor,
        "waited": waited,
        "bound_images_per_second": options.batch / (_sum(rows, "bound") + waited),
    }


def _exchanges(step: Step, rows: list[Row]) -> list[dict[str, Any]]:
    """Each exchange of the towers: its seconds, those of what runs meanwhile, and what is left.

    By bytes alone: what it takes to start one is not known here.
    """
    result = []
    for one in step.exchanges:
        seconds = one.size / (1e12 * cost.LINK_BANDWIDTH)
        meanwhile = _sum(rows[one.started : one.ended], "bound")
        result.append(
            {
                "layer": one.layer, "phase": one.phase, "size": one.size, "seconds": seconds,
                "meanwhile": meanwhile, "waited": max(0.0, seconds - meanwhile),
            }
        )  # fmt: skip
    return result


_SUMMED = ("flops", "bound", "floor_size", "floor_flops", "floor")
_HEAD = [
    "layer", "pass", "kernel", "grid", "tile", "products by", "regs", "shared", "spills", "loads",
    "stores", "loop", "issue", "barriers", "useful", "waves", "instr", "MB", "/floor", "GFLOP",
    "/floor", "floor us", "bound us",
]  # fmt: skip
_LEGEND = """\
tile: rows x columns of a program's result, warps. loads, stores: bytes of an access to what
carries 1% of the bytes. loop: instructions of the loop with the products. issue: time to issue it
over the tensor cores' time for its products. barriers: in a turn of it. useful: operations on real
data over those done. waves: of the tensor cores' time until the last program ends, as simulated,
over the share of taps that are not skipped. instr: instructions of all threads for an element of
the layer's input. MB: every tensor once. floor: the least for the pass, all taps counted; a weight
that is updated in the pass is in MB, and its floor is in the update's. bound: this launch's bytes
and operations at the rates assumed."""


def _number(value: float | None, form: str = "d", scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale if scale != 1.0 else value, form)


def _over(value: float, floor: float | None) -> str:
    return f"{value / floor:.2f}" if floor and value else "-"


def _cells(row: Row) -> list[str]:
    moved, loop = row.read + row.written, row.loop
    looped = ["-"] * 3
    if loop:
        issue = _number(loop.issue_ratio, ".2f")
        looped = [str(loop.instructions), issue, str(loop.barriers)]
    return [
        row.layer,
        row.role or row.phase,
        _short(row.name),
        "x".join(map(str, row.grid)) if row.grid else "-",
        "x".join(map(str, (*row.tile, f"{row.warps}w"))) if row.tile else "-",
        ".".join(loop.product.split(".")[:2]) if loop else "-",
        _number(row.registers),
        _number(row.shared),
        _number(row.spills),
        "/".join(row.loads) or "-",
        "/".join(row.stores) or "-",
        *looped,
        _number(row.useful, ".2f"),
        _number(row.waves, ".2f"),
        _number(row.instructions if not row.flops else None, ".1f"),
        _number(moved, ".2f", 1e-6),
        _over(moved - row.updated, row.floor_size),
        _number(row.flops or None, ".2f", 1e-9),
        _over(row.flops, row.floor_flops),
        _number(row.floor, ".1f", 1e6),
        _number(row.bound, ".1f", 1e6),
    ]


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
            read, written = before.read + row.read, before.written + row.written
            bound = before.bound + row.bound
            names = f"{before.name}, {name}"
            result[-1] = Row(row.layer, row.phase, names, read=read, written=written, bound=bound)
        else:
            result.append(dataclasses.replace(row, name=f"torch: {name}"))
    return result


def describe(report: dict[str, Any], rows: list[Row]) -> list[str]:
    """The report as text."""
    gpu = report["gpu"]
    towers = "one tower of two" if report["gpus"] == 2 else "one GPU"
    layers = [
        [
            layer["layer"], layer["phase"], str(layer["launches"]), f"{layer['size'] / 1e6:.1f}",
            f"{layer['floor_size'] / 1e6:.1f}", f"{layer['flops'] / 1e9:.1f}",
            f"{layer['floor_flops'] / 1e9:.1f}", f"{layer['floor'] * 1e6:.1f}",
            f"{layer['bound'] * 1e6:.1f}",
        ]
        for layer in report["layers"]
    ]  # fmt: skip
    head = [
        "layer", "pass", "launches", "MB", "floor MB", "GFLOP", "floor GFLOP", "floor us",
        "bound us",
    ]  # fmt: skip
    lines = [
        f"AlexNet ({report['variant']}), {report['step']} step, batch {report['batch']}, "
        f"{report['dtype']}, {towers}, {gpu['name']} ({gpu['target']}), triton {report['triton']}",
        "Computed from machine code, nothing was timed. Rates assumed: "
        f"{gpu['tflops']:g} TFLOP/s bf16, {gpu['bandwidth']:g} TB/s.",
        "",
        *table([_HEAD, *map(_cells, _without_operators(rows))], right=17),
        "",
        *table([head, *layers], right=7),
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
    return [*lines, *_totals(report["summary"]), "", _LEGEND]


def _totals(total: dict[str, Any]) -> list[str]:
    update, waited = total["optimizer_bytes_per_parameter"], total["waited"]
    waiting = f" and {waited * 1e6:.0f} us of waiting" if waited else ""
    lines = [
        f"launches a step: {total['launches']} ({total['our_launches']} ours, "
        f"{total['torch_launches']} of torch's operators)",
        f"bytes: {total['bytes'] / 1e6:.0f} MB, floor {total['floor_bytes'] / 1e6:.0f} MB "
        f"({total['bytes'] / total['floor_bytes']:.2f})",
        f"update: {update or 0.0:.1f} bytes a parameter, floor {cost.UPDATE_BYTES} "
        f"({total['update_floor'] * 1e6:.0f} us)",
        f"floor of the step: {total['floor'] * 1e6:.0f} us, ceiling "
        f"{total['ceiling_images_per_second']:,.0f} images/s (computed)",
        f"these launches at the rates assumed: {total['bound'] * 1e6:.0f} us{waiting}, "
        f"{total['bound_images_per_second']:,.0f} images/s (computed)",
    ]
    return [line for line in lines if update is not None or not line.startswith("update")]


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
