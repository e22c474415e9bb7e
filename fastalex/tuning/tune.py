"""Find the fastest tiles on the GPU that is here: ``python -m fastalex.tune``."""

from __future__ import annotations

import argparse
import functools
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastalex.common.command_line import Parser, check_output, guarded
from fastalex.common.compile import TARGETS, check_target, compile_ahead
from fastalex.common.files import replacing
from fastalex.common.provenance import provenance
from fastalex.common.tables import table
from fastalex.common.timing import clock_of
from fastalex.data.base import MAX_IMAGE_SIZE
from fastalex.inspection.gpus import GPU, GPUS
from fastalex.inspection.record import DTYPES, layers_of
from fastalex.model.alexnet import AlexNet, layer_names
from fastalex.model.variants import VARIANTS
from fastalex.tuning import sweep
from fastalex.tuning.sweep import Config, Entry
from fastalex.tuning.workloads import Workload, record_workloads
from fastalex_kernels.common import tuned
from fastalex_kernels.common.backend import interpreted, record_launches
from fastalex_kernels.common.backend import target as target_of

_ROUNDS = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    return guarded("tune", lambda: _run(options))


def _parser() -> Parser:
    parser = Parser(
        prog="python -m fastalex.tune",
        usage="%(prog)s [--batch-size N] [--dtype D] [--layer NAME ...] [options]",
        description="Compile candidate tiles and splits for every launch of a training step, leave "
        "out those that spill, check the others against what they replace, time them on the GPU, "
        "and write the table that fastalex_kernels uses from then on.",
        epilog=f"The table is read from the path in {tuned.VARIABLE}, or from the user's cache "
        "folder. It holds for this GPU, Triton and these kernels, and for the same batch size.",
    )
    parser.add_count("--batch-size", "images", 128)
    parser.add_count("--image-size", "pixels of a side (the variant's own)", most=MAX_IMAGE_SIZE)
    parser.add_choice("--variant", VARIANTS, "paper")
    parser.add_choice("--dtype", DTYPES, "bf16")
    parser.add_argument("--layer", nargs="+", metavar="NAME", help="conv1, ... fc8 (all of them)")
    parser.add_choice("--gpus", (1, 2), 1, "2: one of the two towers")
    parser.add_count("--candidates", "for each key", 16)
    text = "time nothing: compile for --gpu, which need not be here, and estimate"
    parser.add_flag("--dry-run", text)
    parser.add_choice("--gpu", GPUS, "h100")
    parser.add_path("--output", "(the path it is read from; of a dry run, none)", "FILE")
    return parser


def _run(options: argparse.Namespace) -> int:
    if interpreted():
        raise ValueError("TRITON_INTERPRET=1 is set, unset it to tune for a GPU")
    if not options.dry_run and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU here; --dry-run --gpu h100 ranks tiles without one")
    if options.gpus > 1 and VARIANTS[options.variant].towers != options.gpus:
        raise ValueError(f"--gpus 2: variant {options.variant} has no two towers, use --gpus 1")
    with torch.device("meta"):
        names = list(layer_names(AlexNet(variant=options.variant)))
    wrong = [name for name in options.layer or [] if name not in names]
    if wrong:
        raise ValueError(f"--layer {wrong[0]}: expected some of {', '.join(names)}")
    options.layer = options.layer or names
    if options.dry_run:
        gpu = GPUS[options.gpu]
        check_target(gpu.target)
        return tune(options, torch.device("cpu"), gpu.name, options.output, gpu)
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    return tune(options, device, name, options.output or tuned.table_path(name))


def tune(
    options: argparse.Namespace,
    device: torch.device,
    name: str,
    path: Path | None,
    gpu: GPU | None = None,
) -> int:
    """Tune on ``device``, or estimate for ``gpu``; write what comes out at once, and print it."""
    if path is not None and path.is_dir():
        raise ValueError(f"--output {path}: a folder, name a file")
    if path is not None:
        check_output("--output", path.parent, folder=True)
    head = {"timed": gpu is None, **provenance(device), **tuned.identity(name)}
    rows = _known(path, name) if path else {}
    done: list[Entry] = []
    entries = _entries(options, device, gpu)
    try:
        for entry in tqdm(entries, "tuning", unit=" keys", leave=False, disable=None):
            done.append(entry)
            rows[entry.key] = entry.as_row()
            _write(path, {**head, "tiles": list(rows.values())})
    except (KeyboardInterrupt, sweep.UnusableGPU) as stop:
        kept = f"{len(done)} keys are in {path}" if path and done else "nothing was written"
        raise type(stop)(f"{str(stop) or 'interrupted'}, {kept}") from None
    if gpu is not None:
        print(f"{gpu.name}, batch {options.batch_size}, {options.dtype}: nothing was timed\n")
    print("\n".join(_table(done)))
    for entry, config in ((e, c) for e in done for c in e.configs if c.skipped):
        print(f"skipped {entry.layer} {entry.phase} {_shown(entry, config)}: {config.skipped}")
    if path is not None:
        print(f"\ntable {path}")
    return 0


def _entries(options: argparse.Namespace, device: torch.device, gpu: GPU | None) -> Iterator[Entry]:
    """The keys of the step, as they come timed on ``device`` or estimated for ``gpu``."""
    make = functools.partial(
        record_workloads, options.variant, options.batch_size, DTYPES[options.dtype],
        options.image_size, options.gpus,
    )  # fmt: skip
    target = gpu.target if gpu else target_of(device)
    with record_launches(target, lambda *_: None):
        found = make("meta")
    size = options.image_size or found.model.variant.image_size
    layers = layers_of(found.model, options.batch_size, size)
    clock = clock_of(device)
    real: dict[tuple[str, str], Workload] = {}  # once what they launch is compiled

    def measure(entry: Entry, best: dict[tuned.Key, tuned.Tile]) -> None:
        if gpu is not None:
            sweep.rank(entry, layers[entry.layer], gpu, options.dtype)
            return
        if not real:
            real.update(((w.layer, w.phase), w) for w in make(device).workloads)
        sweep.time_configs(entry, real[entry.layer, entry.phase], best, clock, _ROUNDS)

    if gpu is None and target in TARGETS:
        list(compile_ahead([[launch] for launch in found.launches], target))
    workloads = [w for w in found.workloads if w.layer in options.layer]
    return sweep.autotune(workloads, target, options.candidates, measure)


def _known(path: Path, device: str) -> dict[tuned.Key, dict[str, Any]]:
    """The entries of a table that still hold; of other layers or batches, they stay."""
    try:
        valid = tuned.read_table(path, device)
    except (OSError, ValueError):
        return {}
    entries = json.loads(path.read_text(encoding="utf-8"))["tiles"]
    rows = {(e["kernel"], e["kind"], tuple(e["sizes"])): e for e in entries}
    return {key: row for key, row in rows.items() if key in valid}


def _write(path: Path | None, content: dict[str, Any]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _shown(entry: Entry, config: Config) -> str:
    """A product's tile as MxNxK, warps and stages; anything else by the names of its numbers."""
    fields, tile = tuned.FIELDS[entry.key[0]], config.tile
    if len(fields) == 5:
        m, n, k, warps, stages = tile
        return f"{m}x{n}x{k} {warps}w {stages}s"
    named = zip(fields, tile, strict=True)
    return ", ".join(f"{name.removeprefix('num_')} {n}" for name, n in named)


def _table(entries: list[Entry]) -> list[str]:
    lines = [["layer", "pass", "kernel", "own tile", "us", "best tile", "us", "gain", "tried"]]
    for entry in entries:
        own, best = entry.own, entry.best()
        before, after = (math.nan if c.us is None else c.us for c in (own, best))
        lines.append(
            [
                entry.layer, entry.phase, entry.key[0], _shown(entry, own), f"{before:.1f}",
                _shown(entry, best), f"{after:.1f}", f"{before / after:.2f}",
                str(len(entry.left())),
            ]
        )  # fmt: skip
    return table(lines, right=6)
