"""The time of every layer, ours beside torch's: ``python -m fastalex.profiler``."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._functorch import config as functorch_config
from tqdm import tqdm

from fastalex.common.command_line import Parser, check_output, guarded
from fastalex.common.files import replacing
from fastalex.common.nvtx_ranges import nvtx_range
from fastalex.common.provenance import provenance
from fastalex.common.tables import table
from fastalex.common.timing import clock_of, take_turns
from fastalex.data.base import MAX_IMAGE_SIZE
from fastalex.inspection.record import DTYPES, PRECISIONS
from fastalex.model.variants import VARIANTS
from fastalex.tuning.layer_pairs import check, make_call, make_pairs, pair_names
from fastalex.tuning.train_steps import Training, check_steps, stock_step, train_step

NET = "net"  # the row of the whole net, whose one pass is a training step

Calls = dict[str, Callable[[], object]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    options = _parser().parse_args(arguments)
    return guarded("profiler", lambda: _run(options))


def _parser() -> Parser:
    gpu = torch.cuda.is_available()
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
    parser.add_count("--batch-size", "images", 128 if gpu else 16)
    parser.add_count("--rounds", "times each is timed", 30 if gpu else 5)
    parser.add_count("--image-size", "pixels of a side (the variant's own)", most=MAX_IMAGE_SIZE)
    parser.add_choice("--variant", VARIANTS, "paper")
    parser.add_choice("--dtype", DTYPES, "bf16" if gpu else "fp32")
    parser.add_choice("--device", ("cuda", "cpu"), "cuda" if gpu else "cpu")
    text = f"conv1, pool1, ... fc8, {NET} (all of them)"
    parser.add_argument("--layer", nargs="+", metavar="NAME", help=text)
    parser.add_flag("--no-compile", "without torch.compile")
    parser.add_path("--output", "where the report goes", "DIR", default=Path("runs/profile"))
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    names = [*pair_names(options.variant), NET]
    wrong = [name for name in options.layer or [] if name not in names]
    if wrong:
        raise ValueError(f"--layer {wrong[0]}: expected some of {', '.join(names)}")
    if options.dtype not in PRECISIONS:
        if NET in (options.layer or []):
            raise ValueError(f"--layer {NET}: a step takes {' or '.join(PRECISIONS)}, see --dtype")
        names.remove(NET)
    options.layer = [name for name in names if name in (options.layer or names)]
    check_output("--output", options.output, folder=True)
    options.output.mkdir(parents=True, exist_ok=True)
    trace, data = (options.output / name for name in ("trace.json", "profile.json"))
    # A backward pass runs many times: its saved tensors must not be reused by the first.
    with functorch_config.patch(donated_buffer=False):
        report, calls = profile(options)
        print("\n".join(describe(report)), flush=True)
        write_trace(calls, torch.device(options.device), trace)
    with replacing(data) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\ntrace {trace} (open it in ui.perfetto.dev)\nevery round {data}")
    return 0


def profile(options: argparse.Namespace) -> tuple[dict[str, Any], Calls]:
    """Every row as plain data, and the calls that were timed by ``"LAYER PASS, WHOSE"``."""
    device, rows, timed = torch.device(options.device), [], Calls()
    clock = clock_of(device)
    for name, which, error, calls in _passes(options, device):
        named = {k: _in_range(f"{name} {which}, {k}", call) for k, call in calls.items()}
        seconds = take_turns(named, clock, options.rounds)
        rounds = {k: [1e3 * t for t in s] for k, s in seconds.items()}
        ms = {k: statistics.median(times) for k, times in rounds.items()}
        rows.append({"layer": name, "pass": which, "error": error, "ms": ms, "rounds ms": rounds})
        timed |= {f"{name} {which}, {k}": call for k, call in calls.items()}
    given = {k: getattr(options, k) for k in ("variant", "batch_size", "dtype")}
    return {"theme": "profile", **provenance(device), **given, "results": rows}, timed


def _passes(
    options: argparse.Namespace, device: torch.device
) -> Iterator[tuple[str, str, float, Calls]]:
    """What is to be timed: layer, pass, error and calls, each checked before."""
    sizes = options.batch_size, options.variant, options.image_size
    gpu = device.type == "cuda"
    how = {"ours": "triton", "torch": "aten"} if gpu else {"ours": "aten", "torch": "stock"}
    how |= {} if options.no_compile else {"compiled": "compiled"}
    pairs = make_pairs(*sizes[:2], device, DTYPES[options.dtype], sizes[2])
    for name in tqdm(options.layer, unit=" layers", leave=False, disable=None):
        if name == NET:
            training = Training(device, PRECISIONS[options.dtype], *sizes)
            error = check_steps(training, train_step)
            steps: Calls = {"ours": train_step(training), "torch": stock_step(training)}
            if not options.no_compile:
                steps["compiled"] = stock_step(training, compiled=True)
            yield NET, "step", error, steps
            continue
        errors = check(pairs[name], how["ours"])
        for which, error in errors.items():
            calls = {k: make_call(pairs[name], v, which) for k, v in how.items()}
            yield name, which, error, calls


def _in_range(label: str, call: Callable[[], object]) -> Callable[[], object]:
    def inside() -> object:
        with nvtx_range(label):
            return call()

    return inside


def describe(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    rows = report["results"]
    names = list(rows[0]["ms"])
    layers = [row["ms"] for row in rows if row["layer"] != NET]
    if layers:
        total = {name: sum(ms[name] for ms in layers) for name in names}
        rows = [*rows, {"layer": "layers", "pass": "both", "ms": total}]
    lines = [["layer", "pass", *(f"{name} ms" for name in names)]]
    lines[0] += [f"{name}/ours" for name in names[1:]]
    for row in rows:
        ms = row["ms"]
        cells = [row["layer"], row["pass"], *(f"{ms[name]:.3f}" for name in names)]
        lines.append([*cells, *(f"{ms[name] / ms['ours']:.2f}" for name in names[1:])])
    threads = f", {report['threads']} threads" if report["host cpu"] == report["device"] else ""
    return [
        f"AlexNet ({report['variant']}), batch {report['batch_size']}, {report['dtype']}, "
        f"{report['device']}{threads}, torch {report['versions']['torch']}",
        f"Medians over {len(rows[0]['rounds ms']['ours'])} rounds in turn; a ratio above 1: ours "
        "is faster.",
        "",
        *table(lines, right=len(lines[0]) - 2),
    ]


def write_trace(calls: Calls, device: torch.device, path: Path) -> None:
    """Run each call once more under torch's profiler and write a Chrome trace.

    A range ``"conv1 forward, ours"`` encloses what each call did.
    """
    with torch.profiler.profile(record_shapes=True) as profiler:
        for what, call in calls.items():
            with torch.profiler.record_function(what):  # type: ignore[no-untyped-call]
                call()
                if device.type == "cuda":
                    torch.cuda.synchronize()
    with replacing(path) as temporary:
        profiler.export_chrome_trace(str(temporary))
