"""What each launch of a step is worth on a GPU, with no GPU: ``python -m fastalex.roofline``.

The model's step runs on tensors without data; every kernel is compiled for the GPU and its machine
code read. Everything printed is computed, nothing is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import nn
from tqdm import tqdm

from fastalex.common.command_line import Parser, guarded
from fastalex.inspection import cost, offline
from fastalex.inspection.gpus import GPU, GPUS
from fastalex.inspection.record import PRECISIONS, Step, record_step
from fastalex.inspection.report import Row, inspect
from fastalex.model.variants import VARIANTS
from fastalex_kernels.common.backend import interpreted

_NAMES = 34  # characters for the names of torch's operators


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
    report = make_report(options)
    print(json.dumps(report, indent=1) if options.json else "\n".join(describe(report)))
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


def rows_of(options: argparse.Namespace) -> tuple[Step, list[Row]]:
    """The recorded step, and its launches with their machine code read."""
    gpu, step = GPUS[options.gpu], _recorded(options)
    with tqdm(desc="compiling", unit=" kernels", file=sys.stderr, leave=False) as bar:

        def tell(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.set_postfix_str(name, refresh=False)
            bar.update(done - bar.n)

        return step, inspect(step, gpu, options.dtype, tell)


def make_report(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed, as plain data."""
    gpu = GPUS[options.gpu]
    step, rows = rows_of(options)
    exchanges = _exchanges(step, rows)
    return {
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


def _layers(rows: list[Row]) -> list[dict[str, Any]]:
    """Bytes, operations and seconds of every layer, forward and backward, beside the floor's."""
    result: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row.layer, row.phase)
        total = result.setdefault(
            key,
            {
                "layer": row.layer, "phase": row.phase, "launches": 0, "size": 0, "flops": 0.0,
                "bound": 0.0, "floor_size": 0.0, "floor_flops": 0.0, "floor": 0.0,
            },
        )  # fmt: skip
        total["launches"] += 1
        total["size"] += row.read + row.written
        total["flops"] += row.flops
        total["bound"] += row.bound
        for name in ("floor_size", "floor_flops", "floor"):
            total[name] += getattr(row, name) or 0.0
    return list(result.values())


def _summary(
    step: Step,
    rows: list[Row],
    exchanges: list[dict[str, Any]],
    gpu: GPU,
    options: argparse.Namespace,
) -> dict[str, Any]:
    parameters = sum(step.parameters)
    floor = sum(row.floor or 0.0 for row in rows)
    update = cost.UPDATE_BYTES * parameters if options.step == "train" else 0
    update_floor = update / (1e12 * gpu.bandwidth)
    floor += update_floor
    updated = sum(row.updated for row in rows)
    bound = sum(row.bound for row in rows)
    waited = sum(exchange["waited"] for exchange in exchanges)
    return {
        "launches": len(rows),
        "our_launches": sum(row.grid is not None for row in rows),
        "torch_launches": sum(row.grid is None for row in rows),
        "parameters": parameters,
        "linear_parameters": sum(
            sum(p.numel() for p in layer.module.parameters())
            for layer in step.layers.values()
            if isinstance(layer.module, nn.Linear)
        ),
        "optimizer_bytes_per_parameter": updated / parameters if update else None,
        "bytes": sum(row.read + row.written for row in rows),
        "floor_bytes": sum(row.floor_size or 0 for row in rows) + update,
        "flops": sum(row.flops for row in rows),
        "floor_flops": sum(row.floor_flops or 0 for row in rows),
        "update_floor": update_floor,
        "floor": floor,
        "bound": bound,
        # Two towers share the images of a step. The floor takes their exchange to be hidden.
        "ceiling_images_per_second": options.batch / floor,
        "waited": waited,
        "bound_images_per_second": options.batch / (bound + waited),
    }


def _exchanges(step: Step, rows: list[Row]) -> list[dict[str, Any]]:
    """Each exchange of the towers: its seconds, those of what runs meanwhile, and what is left.

    By bytes alone: what it takes to start one is not known here.
    """
    result = []
    for one in step.exchanges:
        seconds = one.size / (1e12 * cost.LINK_BANDWIDTH)
        meanwhile = sum(row.bound for row in rows[one.started : one.ended])
        result.append(
            {
                "layer": one.layer, "phase": one.phase, "size": one.size, "seconds": seconds,
                "meanwhile": meanwhile, "waited": max(0.0, seconds - meanwhile),
            }
        )  # fmt: skip
    return result


_HEAD = (
    "layer", "pass", "kernel", "grid", "tile", "regs", "shared", "spills", "products by",
    "loads", "stores", "loop", "issue", "useful", "waves", "instr", "MB", "/floor", "GFLOP",
    "/floor", "floor us", "bound us",
)  # fmt: skip


_LEGEND = (
    "tile: rows x columns of a program's result, warps. loads, stores: bytes of an access to what",
    "carries 1% of the bytes. loop: instructions of the loop with the products. issue: time to",
    "issue it over the tensor cores' time for its products. useful: operations on real data over",
    "those done. waves: of the tensor cores' time until the last program ends, as simulated, over",
    "the share of taps that are not skipped. instr: instructions of all threads for an element of",
    "the layer's input. MB: every tensor once. floor: the least for the pass, all taps counted; a",
    "weight that is updated in the pass is in MB, and its floor is in the update's.",
    "bound: this launch's bytes and operations at the rates assumed.",
)


def _cells(row: dict[str, Any]) -> list[str]:
    shown = Row(**row)
    megabytes = (shown.read + shown.written) / 1e6

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    def over(value: float, floor: float | None) -> str:
        return "-" if not floor or not value else f"{value / floor:.2f}"

    loads, stores = ("/".join(shown.widths(store)) or "-" for store in (False, True))
    return [
        shown.layer,
        shown.role or shown.phase,
        _short(shown.name),
        "x".join(map(str, shown.grid)) if shown.grid else "-",
        "x".join(map(str, (*shown.tile, f"{shown.warps}w"))) if shown.tile else "-",
        number(shown.registers, "d"),
        number(shown.shared, "d"),
        number(shown.spills, "d"),
        ".".join(shown.mma.split(".")[:2]) if shown.mma else "-",
        loads,
        stores,
        number(shown.loop, "d"),
        number(shown.issue_ratio, ".2f"),
        number(shown.useful, ".2f"),
        number(shown.waves, ".2f"),
        number(shown.instructions, ".1f") if not shown.flops else "-",
        f"{megabytes:.2f}",
        over(shown.read + shown.written - shown.updated, shown.floor_size),
        f"{shown.flops / 1e9:.2f}" if shown.flops else "-",
        over(shown.flops, shown.floor_flops),
        number(shown.floor and shown.floor * 1e6, ".1f"),
        f"{shown.bound * 1e6:.1f}",
    ]


def _short(name: str) -> str:
    return name.strip("_").removesuffix("_kernel")


def _without_operators(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, neighbouring operators of torch's in a layer made one."""
    result: list[dict[str, Any]] = []
    for _, group in itertools.groupby(
        rows, lambda r: (r["layer"], r["phase"], r["grid"] is None or id(r))
    ):
        run = list(group)
        if run[0]["grid"] is not None:
            result += run
            continue
        counts: dict[str, int] = {}
        for row in run:
            name = row["name"].removeprefix("aten.").strip("_")
            counts[name] = counts.get(name, 0) + 1
        names = ", ".join(f"{n} {name}" if n > 1 else name for name, n in counts.items())
        names = textwrap.shorten(names, _NAMES, placeholder=" ...")
        total = {key: sum(row[key] for row in run) for key in ("read", "written", "bound")}
        result.append({**run[0], **total, "name": f"torch: {names}"})
    return result


def _table(head: Sequence[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(r[i]) for r in [list(head), *rows]) for i in range(len(head))]
    left = {"layer", "pass", "kernel", "grid", "tile", "products by"}
    lines = []
    for cells in [list(head), *rows]:
        padded = [
            cell.ljust(width) if name in left else cell.rjust(width)
            for cell, width, name in zip(cells, widths, head, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def describe(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    gpu, total = report["gpu"], report["summary"]
    towers = "one tower of two" if report["gpus"] == 2 else "one GPU"
    lines = [
        f"AlexNet ({report['variant']}), {report['step']} step, batch {report['batch']}, "
        f"{report['dtype']}, {towers}, {gpu['name']} ({gpu['target']}), triton {report['triton']}",
        "Computed from machine code, nothing was timed. Rates assumed: "
        f"{gpu['tflops']:g} TFLOP/s bf16, {gpu['bandwidth']:g} TB/s.",
        "",
        *_table(_HEAD, [_cells(r) for r in _without_operators(report["launches"])]),
        "",
    ]
    layers = [
        [
            layer["layer"], layer["phase"], str(layer["launches"]), f"{layer['size'] / 1e6:.1f}",
            f"{layer['floor_size'] / 1e6:.1f}", f"{layer['flops'] / 1e9:.1f}",
            f"{layer['floor_flops'] / 1e9:.1f}", f"{layer['floor'] * 1e6:.1f}",
            f"{layer['bound'] * 1e6:.1f}",
        ]
        for layer in report["layers"]
    ]  # fmt: skip
    head = (
        "layer", "pass", "launches", "MB", "floor MB", "GFLOP", "floor GFLOP", "floor us",
        "bound us",
    )  # fmt: skip
    lines += [*_table(head, layers), "", *_exchange_table(report["exchanges"])]
    return [*lines, *_totals(report, total), "", *_LEGEND]


def _exchange_table(exchanges: list[dict[str, Any]]) -> list[str]:
    """What the towers exchange; nothing of a whole net."""
    if not exchanges:
        return []
    head = ("layer", "pass", "MB each way", "exchange us", "meanwhile us", "waited us")
    rows = [
        [
            one["layer"], one["phase"], f"{one['size'] / 1e6:.2f}",
            *(f"{one[name] * 1e6:.1f}" for name in ("seconds", "meanwhile", "waited")),
        ]
        for one in exchanges
    ]  # fmt: skip
    return [*_table(head, rows), f"(each direction at {cost.LINK_BANDWIDTH:g} TB/s)", ""]


def _totals(report: dict[str, Any], total: dict[str, Any]) -> list[str]:
    lines = [
        f"launches a step: {total['launches']} ({total['our_launches']} ours, "
        f"{total['torch_launches']} of torch's operators)",
        f"bytes: {total['bytes'] / 1e6:.0f} MB, floor {total['floor_bytes'] / 1e6:.0f} MB "
        f"({total['bytes'] / total['floor_bytes']:.2f})",
    ]
    if total["optimizer_bytes_per_parameter"] is not None:
        lines.append(
            f"update: {total['optimizer_bytes_per_parameter']:.1f} bytes a parameter, floor "
            f"{cost.UPDATE_BYTES} ({total['update_floor'] * 1e6:.0f} us)"
        )
    waited = total["waited"]
    return [
        *lines,
        f"floor of the step: {total['floor'] * 1e6:.0f} us, ceiling "
        f"{total['ceiling_images_per_second']:,.0f} images/s (computed)",
        f"these launches at the rates assumed: {total['bound'] * 1e6:.0f} us"
        + (f" and {waited * 1e6:.0f} us of waiting, " if waited else ", ")
        + f"{total['bound_images_per_second']:,.0f} images/s (computed)",
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
