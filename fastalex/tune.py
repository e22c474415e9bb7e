"""Find the fastest tiles on the GPU that is here: ``python -m fastalex.tune``."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastalex import layer_pairs, offline, tuning
from fastalex.command_line import Parser, check_output, guarded, whole_number
from fastalex.evaluate import table
from fastalex.files import replacing
from fastalex.gpus import GPUS
from fastalex.provenance import provenance
from fastalex.recorded_step import DTYPES
from fastalex.timing import clock_of
from fastalex.tuning_candidates import follows_tile
from fastalex.tuning_problems import Candidate, Problem, Subject, Task, fake_problems, tasks
from fastalex.variants import VARIANTS
from fastalex_kernels import _tuned
from fastalex_kernels._launch import interpreted
from fastalex_kernels._launch import target as target_of

_ROUNDS = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code. 0: swept. 2: something was wrong, one line on stderr says what. 130: Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    return guarded("tune", lambda: _run(options))


def _parser() -> Parser:
    parser = Parser(
        prog="python -m fastalex.tune",
        usage="%(prog)s [--batch-size N] [--dtype D] [--layer NAME ...] [options]",
        description="Compile candidate tiles and splits for every layer and pass, leave out those "
        "that spill, check the others against float64, time them on the GPU, and write the table "
        "that fastalex_kernels uses from then on.",
        epilog=f"The table is read from the path in {_tuned.VARIABLE}, or from the user's cache "
        "folder. It holds for this GPU, Triton and these kernels, and for the same batch size.",
        allow_abbrev=False,
    )
    number: dict[str, Any] = {"type": whole_number(1), "metavar": "N"}
    parser.add_argument("--batch-size", default=128, help="images (default: 128)", **number)
    parser.add_argument("--image-size", help="pixels of a side (the variant's own)", **number)
    parser.add_argument("--variant", choices=tuple(VARIANTS), default="paper")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="(%(default)s)")
    parser.add_argument("--layer", nargs="+", metavar="NAME", help="conv1, ... fc8 (all of them)")
    parser.add_argument(
        "--gpus", type=int, choices=(1, 2), default=1, help="2: one of the two towers (default: 1)"
    )
    parser.add_argument("--candidates", default=16, help="tiles for each problem (16)", **number)
    parser.add_argument("--seconds", help="start no problem after so many", **number)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="with no GPU: compile for --gpu and rank by the machine code; under "
        "TRITON_INTERPRET=1 check and time in the interpreter",
    )
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h100", help="(%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="(the path it is read from)")
    return parser


def _run(options: argparse.Namespace) -> int:
    if not options.dry_run and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU here; --dry-run --gpu h100 ranks tiles without one")
    if interpreted() and not options.dry_run:
        raise ValueError("TRITON_INTERPRET=1 is set, unset it to tune for the GPU")
    if options.gpus > 1 and VARIANTS[options.variant].towers != options.gpus:
        raise ValueError(f"--gpus 2: variant {options.variant} has no two towers, use --gpus 1")
    if options.output is not None:
        _check_table(options.output)
    names = layer_pairs.layer_names(options.variant)
    wrong = [name for name in options.layer or [] if name not in names]
    if wrong:
        raise ValueError(f"--layer {wrong[0]}: expected some of {', '.join(names)}")
    options.layer = options.layer or names
    if interpreted():
        return _sweep(options, torch.device("cpu"), "interpreter")
    if options.dry_run:
        return _rank(options)
    device = torch.device("cuda", torch.cuda.current_device())
    return _sweep(options, device, torch.cuda.get_device_name(device))


def _subject(options: argparse.Namespace) -> Subject:
    return Subject(
        options.variant, options.batch_size, DTYPES[options.dtype], options.layer,
        options.image_size, options.gpus,
    )  # fmt: skip


def _compile(problems: list[Problem], target: str, shared: int) -> None:
    total = sum(len(problem.candidates) for problem in problems)
    with tqdm(total=total, desc="compiling", unit=" tiles", leave=False, disable=None) as bar:
        tuning.compile_candidates(problems, target, shared, bar.update)


def _rank(options: argparse.Namespace) -> int:
    """The dry run: nothing is timed, so nothing is written unless --output asks for it."""
    gpu = GPUS[options.gpu]
    offline.check_target(gpu.target)
    shared = offline.TARGETS[gpu.target].shared_limit
    subject = _subject(options)
    problems, layers = fake_problems(subject, gpu.target, shared, options.candidates)
    _compile(problems, gpu.target, shared)
    for problem in tqdm(problems, desc="reading", leave=False, disable=None):
        tuning.rank(problem, layers[problem.layer], gpu, options.dtype)
    print(f"{gpu.name}, batch {options.batch_size}, {options.dtype}: computed, nothing was timed")
    print("score: share of the tensor cores' time that real operations can fill; without products,")
    print("time for the bytes over time to issue the instructions\n")
    lines = [["layer", "pass", "kernel", "tile", "score", ""]]
    for problem in problems:
        left = sorted(problem.left(), key=lambda c: -(c.score or 0.0))
        for candidate in left:
            score = "-" if candidate.score is None else f"{candidate.score:.2f}"
            own = "own" if candidate is problem.own else ""
            tile = _shown(problem, candidate)
            lines.append([problem.layer, problem.direction, problem.key[0], tile, score, own])
    print("\n".join(table(lines, right=2)))
    _name_skipped(problems)
    if options.output:
        content = {"timed": False, "device": gpu.name, **_head(torch.device("cpu"), gpu.name)}
        _write(options.output, {**content, "tiles": [tuning.entry(p) for p in problems]})
    return 0


def _sweep(options: argparse.Namespace, device: torch.device, name: str) -> int:
    """Check and time on ``device``, and write what was found."""
    path: Path = options.output or _tuned.table_path(name)
    _check_table(path)
    sweep = _Sweep(options, device)
    sweep.run()
    entries = [tuning.entry(problem) for problem in sweep.done]
    new = {_key(e) for e in entries}
    entries = [e for e in _known(path, name) if _key(e) not in new] + entries
    print("\n".join(_describe(sweep.done)))
    _name_skipped(sweep.done)
    if sweep.missed:
        total = len(sweep.done) + sweep.missed
        print(f"{sweep.missed} of {total} problems were not reached")
    _write(path, {"timed": True, **_head(device, name), "tiles": entries})
    if sweep.broken is not None:
        print(f"tune: error: {sweep.broken}", file=sys.stderr)
        return 2
    return 0


class _Sweep:
    """Two rounds: tiles, then what follows from the best of them."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.done: list[Problem] = []
        self.missed = 0
        self.broken: RuntimeError | None = None
        self._deadline = time.monotonic() + (options.seconds or float("inf"))
        self._subject, self._limit = _subject(options), options.candidates
        self._clock, self._rounds = clock_of(device), 1 if interpreted() else _ROUNDS
        self._target = target_of(device)
        self._device = device
        self._known = offline.TARGETS.get(self._target)

    def run(self) -> None:
        todo = tasks(self._subject.pairs(self._device), self._subject.towers)
        by_pass = {(task.layer, task.direction): task for task in todo}
        for following in (False, True):
            problems = [p for p in self._find() if follows_tile(p.key) is following]
            done = self._time(problems, by_pass)
            self.done += done
            self.missed += len(problems) - len(done)

    def _settled(self) -> dict[_tuned.Key, _tuned.Tile]:
        return {problem.key: tuning.best(problem).tile for problem in self.done}

    def _find(self) -> list[Problem]:
        shared = self._known.shared_limit if self._known else 1 << 30  # it refuses for itself
        problems, _ = fake_problems(
            self._subject, self._target, shared, self._limit, self._settled()
        )
        return problems

    def _time(self, problems: list[Problem], by_pass: dict[tuple[str, str], Task]) -> list[Problem]:
        """Those of ``problems`` that were reached."""
        if self._late():
            return []
        if self._known:
            _compile(problems, self._target, self._known.shared_limit)
        settled = self._settled()
        for i, problem in enumerate(tqdm(problems, desc="timing", leave=False, disable=None)):
            if self._late():
                return problems[:i]
            task = by_pass[problem.layer, problem.direction]
            try:
                tuning.time_candidates(
                    problem, task, self._target, self._clock, self._rounds, settled
                )
            except RuntimeError as error:
                self.broken = error
                return problems[:i]
        return problems

    def _late(self) -> bool:
        return self.broken is not None or time.monotonic() > self._deadline


def _head(device: torch.device, name: str) -> dict[str, Any]:
    return {**provenance(device), **_tuned.identity(name)}


def _check_table(path: Path) -> None:
    """Find before any work whether ``_write`` could write it, and its folder."""
    if path.is_dir():
        raise ValueError(f"--output {path}: a folder, name a file")
    check_output("--output", path.parent, folder=True)


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry["kernel"], entry["kind"], tuple(entry["sizes"])


def _known(path: Path, device: str) -> list[dict[str, Any]]:
    """The entries of a table that still holds; of other layers or batches, they stay."""
    try:
        _tuned.read_table(path, device)
    except (OSError, ValueError):
        return []
    entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["tiles"]
    return entries


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"\ntable {path}")


def _shown(problem: Problem, candidate: Candidate) -> str:
    """A product's tile as MxNxK, warps and stages; anything else by the names of its numbers."""
    fields, tile = _tuned.FIELDS[problem.key[0]], candidate.tile
    if len(fields) == 5:
        m, n, k, warps, stages = tile
        return f"{m}x{n}x{k} {warps}w {stages}s"
    named = zip(fields, tile, strict=True)
    return ", ".join(f"{name.removeprefix('num_')} {n}" for name, n in named)


def _describe(problems: list[Problem]) -> list[str]:
    lines = [["layer", "pass", "kernel", "own tile", "us", "best tile", "us", "gain", "tried"]]
    for problem in problems:
        own, chosen = problem.own, tuning.best(problem)
        gain = own.seconds and chosen.seconds and own.seconds / chosen.seconds
        lines.append(
            [
                problem.layer, problem.direction, problem.key[0], _shown(problem, own),
                _microseconds(own), _shown(problem, chosen), _microseconds(chosen),
                f"{gain:.2f}" if gain else "-", str(len(problem.left())),
            ]
        )  # fmt: skip
    return table(lines, right=6)


def _microseconds(candidate: Candidate) -> str:
    return "-" if candidate.seconds is None else f"{1e6 * candidate.seconds:.1f}"


def _name_skipped(problems: list[Problem]) -> None:
    for problem in problems:
        for c in problem.candidates:
            if c.skipped:
                what = f"{problem.layer} {problem.direction} {_shown(problem, c)}"
                print(f"skipped {what}: {c.skipped}")


if __name__ == "__main__":
    sys.exit(main())
