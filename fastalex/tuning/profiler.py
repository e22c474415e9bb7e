"""The time of every layer, ours beside torch's: ``python -m fastalex.profiler``."""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastalex.common.command_line import Parser, check_output, guarded
from fastalex.common.files import replacing
from fastalex.common.nvtx_ranges import nvtx_range
from fastalex.common.provenance import device_name, provenance
from fastalex.common.tables import table
from fastalex.common.timing import clock_of, take_turns
from fastalex.data.base import MAX_IMAGE_SIZE
from fastalex.inspection.cost import Floor
from fastalex.inspection.gpus import find_gpu
from fastalex.inspection.record import DTYPES, PRECISIONS
from fastalex.model.variants import VARIANTS
from fastalex.tuning.layer_pairs import (
    check,
    make_call,
    make_nets,
    make_pairs,
    pair_floors,
    pair_names,
)
from fastalex.tuning.train_steps import Training, check_steps, stock_step, train_step

NET = "net"  # the row of the whole net, whose one pass is a training step
_BATCH = {"cpu": 16, "cuda": 128}
_ROUNDS = {"cpu": 5, "cuda": 30}
_DIRECTIONS = ("forward", "backward")

Calls = dict[str, Callable[[], object]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code. 0: measured. 2: something was wrong, one line on stderr says what. 130:
        Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    return guarded("profiler", lambda: _run(options))


def _parser() -> Parser:
    parser = Parser(
        prog="python -m fastalex.profiler",
        usage="%(prog)s [--batch-size N] [--dtype D] [--output DIR] [options]",
        description="Time every layer forward and backward: ours, the same functions on torch's "
        "operators (cuDNN on a GPU, stock torch.nn on a CPU), and torch.compile of the stock net; "
        "and a whole training step, as it trains, against stock torch.nn with torch's fused SGD. "
        "Results are checked against float64 first.",
        epilog="Ranges for Nsight Systems are on: nsys profile --trace=cuda,nvtx -o layers "
        "python -m fastalex.profiler --no-compile",
    )
    parser.add_count("--batch-size", "images (128 on a GPU, 16 on a CPU)")
    parser.add_count("--rounds", "times each is timed (30 on a GPU, 5 on a CPU)")
    parser.add_count("--image-size", "pixels of a side (the variant's own)", most=MAX_IMAGE_SIZE)
    parser.add_choice("--variant", VARIANTS, "paper")
    parser.add_choice("--dtype", DTYPES, None, "(bf16 on a GPU, fp32 on a CPU)")
    parser.add_choice("--device", ("cuda", "cpu"), None, "(a GPU if there is one)")
    text = f"conv1, pool1, ... fc8, {NET} (all of them)"
    parser.add_argument("--layer", nargs="+", metavar="NAME", help=text)
    parser.add_flag("--no-compile", "without torch.compile")
    parser.add_path("--output", "where the report goes", "DIR", default=Path("runs/profile"))
    return parser


def _run(options: argparse.Namespace) -> int:
    _complete(options)
    check_output("--output", options.output, folder=True)
    options.output.mkdir(parents=True, exist_ok=True)
    trace, data = (options.output / name for name in ("trace.json", "profile.json"))
    with _kept_graphs():
        report, calls = profile(options)
        for line in describe(report):
            print(line, flush=True)
        write_trace(calls, torch.device(options.device), trace)
    with replacing(data) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\ntrace {trace} (open it in ui.perfetto.dev)\nevery round {data}")
    return 0


def _complete(options: argparse.Namespace) -> None:
    """Fill in what depends on the device.

    Raises:
        ValueError: for a GPU that is not there, and a layer that the net has not.
    """
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise ValueError("--device cuda: torch finds no GPU here")
    options.device = options.device or ("cuda" if available else "cpu")
    options.batch_size = options.batch_size or _BATCH[options.device]
    options.rounds = options.rounds or _ROUNDS[options.device]
    options.dtype = options.dtype or ("bf16" if options.device == "cuda" else "fp32")
    names = pair_names(options.variant)
    if options.dtype in PRECISIONS:
        names.append(NET)
    elif NET in (options.layer or []):
        raise ValueError(f"--layer {NET}: a step takes {' or '.join(PRECISIONS)}, see --dtype")
    wrong = [name for name in options.layer or [] if name not in names]
    if wrong:
        raise ValueError(f"--layer {wrong[0]}: expected some of {', '.join(names)}")
    options.layer = [name for name in names if name in (options.layer or names)]


def profile(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Calls]]:
    """Every row as plain data, and the calls that were timed by ``"LAYER PASS"``."""
    device = torch.device(options.device)
    clock, gpu = clock_of(device), None
    if device.type == "cuda":
        gpu = find_gpu(device_name(device))
    rows: list[dict[str, Any]] = []
    timed: dict[str, Calls] = {}
    for name, which, error, calls, floor in _passes(options, device):
        what = f"{name} {which}"
        with nvtx_range(what):
            seconds = take_turns(_marked(calls, what), clock, options.rounds)
        least = gpu and floor and gpu.seconds(floor.flops, floor.size, options.dtype)
        rows.append(
            {
                "layer": name,
                "pass": which,
                "error": error,
                "ms": {k: 1e3 * statistics.median(s) for k, s in seconds.items()},
                "floor ms": least and 1e3 * least,
                "rounds ms": {k: [1e3 * t for t in s] for k, s in seconds.items()},
            }
        )
        timed[what] = calls
    given = {k: getattr(options, k) for k in ("variant", "batch_size", "dtype")}
    return {"theme": "profile", **provenance(device), **given, "results": rows}, timed


def _passes(
    options: argparse.Namespace, device: torch.device
) -> Iterator[tuple[str, str, float, Calls, Floor | None]]:
    """What is to be timed: layer, pass, error, calls and least work, each checked before."""
    nets = make_nets(options.variant, device, DTYPES[options.dtype])
    pairs = make_pairs(options.batch_size, nets, options.image_size)
    floors, how = pair_floors(pairs), _rivals(device, options)
    for name in tqdm(options.layer, unit=" layers", leave=False, disable=None):
        if name == NET:
            yield (NET, "step", *_step(options, device), None)
            continue
        errors = check(pairs[name], how["ours"])
        for which in _DIRECTIONS:
            calls = {k: make_call(pairs[name], v, which) for k, v in how.items()}
            yield name, which, errors[which], calls, floors.get((name, which))


def _step(options: argparse.Namespace, device: torch.device) -> tuple[float, Calls]:
    """The error of a training step, and ours beside torch's."""
    training = Training(
        device, PRECISIONS[options.dtype], options.batch_size, options.variant, options.image_size
    )
    error = check_steps(training, train_step)
    calls: Calls = {"ours": train_step(training), "torch": stock_step(training)}
    if not options.no_compile:
        calls["compiled"] = stock_step(training, compiled=True)
    return error, calls


def _rivals(device: torch.device, options: argparse.Namespace) -> dict[str, str]:
    """What is timed, by the name it is shown under; see ``layer_pairs.make_call``."""
    gpu = device.type == "cuda"
    how = {"ours": "triton", "torch": "aten"} if gpu else {"ours": "aten", "torch": "stock"}
    return how if options.no_compile else {**how, "compiled": "compiled"}


@contextlib.contextmanager
def _kept_graphs() -> Iterator[None]:
    """torch.compile must not reuse the saved tensors of a backward pass that runs many times."""
    from torch._functorch import config

    before, config.donated_buffer = config.donated_buffer, False
    try:
        yield
    finally:
        config.donated_buffer = before


def _marked(calls: Calls, what: str) -> Calls:
    """The calls, each inside a range of its name."""

    def marked(name: str, call: Callable[[], object]) -> Callable[[], object]:
        label = nvtx_range(f"{what}, {name}")

        def inside() -> object:
            with label:
                return call()

        return inside

    return {name: marked(name, call) for name, call in calls.items()}


def describe(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    rows = report["results"]
    names = list(rows[0]["ms"])
    head = ["layer", "pass", *(f"{name} ms" for name in names)]
    head += [f"{name}/ours" for name in names[1:]] + ["floor ms", "of floor"]
    lines = [head]
    totals: dict[str, float] = dict.fromkeys(names, 0.0)
    for row in rows:
        ms, floor = row["ms"], row["floor ms"]
        for name in names:
            totals[name] += ms[name] if row["layer"] != NET else 0.0
        cells = [row["layer"], row["pass"], *(f"{ms[name]:.3f}" for name in names)]
        cells += [f"{ms[name] / ms['ours']:.2f}" for name in names[1:]]
        cells += [f"{floor:.4f}", f"{floor / ms['ours']:.0%}"] if floor else ["-", "-"]
        lines.append(cells)
    if totals["ours"]:
        cells = ["layers", "both", *(f"{totals[name]:.3f}" for name in names)]
        cells += [f"{totals[name] / totals['ours']:.2f}" for name in names[1:]]
        lines.append([*cells, "-", "-"])
    threads = f", {report['threads']} threads" if report["host cpu"] == report["device"] else ""
    return [
        f"AlexNet ({report['variant']}), batch {report['batch_size']}, {report['dtype']}, "
        f"{report['device']}{threads}, torch {report['versions']['torch']}",
        f"Medians over {len(rows[0]['rounds ms']['ours'])} rounds in turn; a ratio above 1: ours "
        "is faster.",
        "",
        *table(lines, right=len(head) - 2),
    ]


def write_trace(calls: dict[str, Calls], device: torch.device, path: Path) -> None:
    """Run each call once more under torch's profiler and write a Chrome trace.

    A range ``"conv1 forward, ours"`` encloses what each call did.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for what, group in calls.items():
            for name, call in group.items():
                with torch.profiler.record_function(f"{what}, {name}"):  # type: ignore[no-untyped-call]
                    call()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
    with replacing(path) as temporary:
        profiler.export_chrome_trace(str(temporary))
