"""Sweep of tiles: which problems a net's layers pose, and what each candidate makes of them."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastalex import layer_pairs, offline
from fastalex.gpus import GPU
from fastalex.inspection import inspect
from fastalex.layer_pairs import LayerPair, WrongResult
from fastalex.layers import Linear, LinearReLUDropout
from fastalex.recorded_step import Event, Layer, Step, default_dtype
from fastalex.timing import Clock, take_turns
from fastalex_kernels import backend
from fastalex_kernels._launch import record_launches, run
from fastalex_kernels._linear_update import linear_backward_weight_update
from fastalex_kernels._tuned import Key, Tile, choosing
from fastalex_kernels.momentum import MomentumUpdate
from fastalex_kernels.reference import relative_error, tolerance

ISSUE_BAR = 0.4  # instructions are issued in less than this share of the products' time
_RATE = (1.0, 0.0, 0.0)  # learning rate, momentum, decay: the velocity becomes the gradient
# (BLOCK_M, BLOCK_N, num_warps): at most 128 sums in a thread's registers.
_SHAPES = {
    16: [
        (128, 128, 8), (128, 64, 4), (128, 256, 8), (256, 128, 8), (128, 64, 8), (64, 128, 4),
        (128, 128, 4), (256, 64, 8), (64, 64, 4), (64, 256, 8),
    ],
    32: [(64, 64, 8), (64, 32, 4), (32, 64, 4), (128, 64, 8), (32, 32, 4), (64, 128, 8)],
}  # fmt: skip
_DEPTHS = {16: (64, 32, 128), 32: (32, 16)}  # BLOCK_K, the likeliest first
_STAGES = {16: (4, 3, 5, 2), 32: (3, 2)}
_INTERPRETED: list[Tile] = [(1024, 512, 512, 4, 1), (512, 256, 256, 4, 1)]


@dataclass(frozen=True)
class Task:
    """A pass through a layer that launches kernels, and its comparison with float64."""

    layer: str
    direction: str
    run: Callable[[], object]
    check: Callable[[], object]


@dataclass
class Candidate:
    """A tile for one problem, and what became of it."""

    tile: Tile
    skipped: str | None = None
    seconds: float | None = None
    score: float | None = None  # of the tensor cores' time, at best; computed
    launches: list[offline.Launch] = field(default_factory=list)


@dataclass
class Problem:
    """What one kernel is asked in one pass; the first candidate is the tables' own tile."""

    layer: str
    direction: str
    key: Key
    candidates: list[Candidate]

    @property
    def own(self) -> Candidate:
        return self.candidates[0]

    def left(self) -> list[Candidate]:
        return [c for c in self.candidates if c.skipped is None]


def tasks(pairs: Mapping[str, LayerPair]) -> list[Task]:
    """The passes of the layers whose kernels have tile tables."""
    found = []
    for name, pair in pairs.items():
        if not hasattr(pair.ours, "weight"):
            continue
        check = _checker(pair)
        for direction in ("forward", "backward"):
            found.append(Task(name, direction, _runner(pair, direction), check))
        if isinstance(pair.ours, (Linear, LinearReLUDropout)) and pair.ours.bias is not None:
            found.append(_update_task(pair))
    return found


def _checker(pair: LayerPair) -> Callable[[], object]:
    return lambda: layer_pairs.check(pair, "triton")


def _runner(pair: LayerPair, direction: str) -> Callable[[], object]:
    """One pass, made anew each time: what it launches depends on the tiles at that moment."""
    x = layer_pairs.laid_out(pair.input, "triton")

    def forward() -> torch.Tensor:
        with backend("triton"):
            return pair.ours(x)  # type: ignore[no-any-return]

    if direction == "forward":
        return forward
    made: list[Any] = []

    def backward() -> object:
        if not made:
            output = forward()
            made.extend((output, layer_pairs.gradient_like(output)))
        output, dy = made
        return torch.autograd.grad(output, pair.tensors(x, pair.ours), dy, retain_graph=True)

    return backward


def _update_task(pair: LayerPair) -> Task:
    """The weight's gradient and update in one kernel, as training on a GPU has it."""
    x, outputs = pair.input.detach(), pair.ours.weight.shape[0]  # type: ignore[index, union-attr]
    dz = torch.randn(len(x), int(outputs)).to(x.device, x.dtype)
    weight = torch.zeros(int(outputs), x.shape[1], dtype=torch.float32, device=x.device)
    rate = torch.tensor(_RATE, dtype=torch.float32, device=x.device)
    narrow = torch.empty_like(weight, dtype=x.dtype) if x.dtype != torch.float32 else None

    def update() -> torch.Tensor:
        velocity = torch.zeros_like(weight)
        linear_backward_weight_update(dz, x, MomentumUpdate(weight, velocity, rate, operand=narrow))
        return velocity

    def check() -> None:
        error = relative_error(update(), dz.double().t() @ x.double())
        bound = tolerance(x.dtype, len(x))
        if not error <= bound:
            raise WrongResult(f"{pair.name}: update is {error:.1e} away, allowed are {bound:.1e}")

    return Task(pair.name, "update", update, check)


class _Recording:
    """The launches of a pass, by the tile that was looked up before them."""

    def __init__(self, task: Task, target: str, tile: Mapping[Key, Tile], launching: bool) -> None:
        self.own: dict[Key, Tile] = {}
        self.launches: dict[Key, list[offline.Launch]] = {}
        self._current: Key | None = None
        self._tile, self._launching = tile, launching
        with choosing(self._choose), record_launches(target, self._launched):
            task.run()

    def _choose(self, key: Key, tile: Tile) -> Tile:
        self._current = key
        self.own[key] = tile
        return self._tile.get(key, tile)

    def _launched(self, kernel: Any, grid: Any, args: Any, kwargs: Any) -> None:
        if self._current is not None:
            launch = offline.Launch(kernel, grid, args, kwargs)
            self.launches.setdefault(self._current, []).append(launch)
        if self._launching:
            run(kernel, grid, args, kwargs)


def candidate_tiles(own: Tile, bits: int, shared: int) -> Iterator[Tile]:
    """Tiles to try, the likeliest first: every shape at its deepest pipeline, then shallower ones.

    Args:
        own: what the tables hold.
        bits: of an operand.
        shared: bytes of shared memory that a program can have.
    """
    yield own
    for stage in range(2):
        for depth in _DEPTHS[bits]:
            for m, n, warps in _SHAPES[bits]:
                size = (m + n) * depth * bits // 8
                fitting = [s for s in _STAGES[bits] if s * size <= shared]
                if stage < len(fitting):
                    yield m, n, depth, warps, fitting[stage]


def find_problems(
    todo: Iterable[Task], target: str, bits: int, shared: int, limit: int
) -> list[Problem]:
    """The problems that passes on tensors without data pose, each with up to ``limit`` candidates.

    A tile that is cut to the same launches as one before it is left out.
    """
    problems: dict[Key, Problem] = {}
    for task in todo:
        for key, own in _Recording(task, target, {}, False).own.items():
            if key in problems:
                continue
            if target == "interpreter":
                tiles: Iterable[Tile] = [own, *_INTERPRETED]
            else:
                tiles = candidate_tiles(own, bits, shared)
            seen: set[str] = set()
            problem = problems[key] = Problem(task.layer, task.direction, key, [])
            for tile in tiles:
                launches = _Recording(task, target, {key: tile}, False).launches.get(key, [])
                what = repr([(launch.name, launch.grid, launch.kwargs) for launch in launches])
                if what not in seen and len(problem.candidates) < limit:
                    seen.add(what)
                    problem.candidates.append(Candidate(tile, launches=launches))
    return list(problems.values())


def fake_problems(
    variant: str, batch: int, dtype: torch.dtype, image_size: int | None, names: list[str],
    target: str, shared: int, limit: int,
) -> tuple[list[Problem], dict[str, Layer]]:  # fmt: skip
    """``find_problems`` for layers of a net that takes no memory, and these layers."""
    with FakeTensorMode(allow_non_fake_inputs=True), default_dtype(dtype):
        nets = layer_pairs.make_nets(variant, "cpu", dtype)
        pairs = layer_pairs.make_pairs(batch, nets, image_size)
        chosen = {name: pair for name, pair in pairs.items() if name in names}
        bits = 8 * dtype.itemsize
        found = find_problems(tasks(chosen), target, bits, shared, limit)
        layers = {name: layer_pairs.as_layer(pair) for name, pair in chosen.items()}
    for candidate in (c for problem in found for c in problem.candidates):
        candidate.launches = [
            replace(launch, args=tuple(map(offline.without_data, launch.args)))
            for launch in candidate.launches
        ]
    return found, layers


_waiting: tuple[list[list[offline.Launch]], str] = ([], "")  # what a forked process inherits


def _compile(i: int) -> tuple[int, str | None]:
    groups, target = _waiting
    try:
        for launch in groups[i]:
            offline.compile_launch(launch, target)
    except Exception as error:  # of any kind: a candidate that fails is left out, and named
        return i, describe_failure(error)
    return i, None


def describe_failure(error: Exception) -> str:
    """One line that names an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def compile_candidates(
    problems: list[Problem], target: str, shared: int, progress: Callable[[], object]
) -> None:
    """Compile every candidate, on all cores, and skip those that fail, spill or do not fit."""
    global _waiting
    candidates = [c for problem in problems for c in problem.candidates]
    _waiting = ([c.launches for c in candidates], target)
    workers = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("fork")
    with context.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        for i, failure in pool.imap_unordered(_compile, range(len(candidates))):
            candidates[i].skipped = failure
            progress()
    for candidate in candidates:
        if candidate.skipped is None:
            candidate.skipped = _unfit(candidate, target, shared)


def _unfit(candidate: Candidate, target: str, shared: int) -> str | None:
    for launch in candidate.launches:
        code = offline.read(offline.compile_launch(launch, target))
        if code.spills or code.stack:
            return f"{launch.name} spills ({code.spills} instructions, {code.stack} bytes)"
        if code.shared > shared:
            return f"{launch.name} needs {code.shared} bytes of shared memory, there are {shared}"
    return None


def rank(problem: Problem, layer: Layer, gpu: GPU, dtype: str) -> None:
    """Score each candidate that is left by its machine code, without running it.

    The score is the share of the tensor cores' time that real operations can fill: the simulated
    waves, times the useful share of the tile, less what issuing the loop takes beyond the bar.
    """
    for candidate in problem.left():
        events = [
            Event(
                problem.layer,
                "forward" if problem.direction == "forward" else "backward",
                launch.name,
                launch,
                {name: name for name in launch.named_args},
            )
            for launch in candidate.launches
        ]
        rows = inspect(Step(events, {problem.layer: layer}), gpu, dtype)
        row = next((row for row in rows if row.mma), None)
        if row is not None and row.waves and row.issue_ratio:
            useful = 1.0 if row.useful is None else min(row.useful, 1.0)
            candidate.score = row.waves * useful * min(1.0, ISSUE_BAR / row.issue_ratio)


def time_candidates(problem: Problem, task: Task, target: str, clock: Clock, rounds: int) -> None:
    """Check each candidate that is left against float64, and time its launches.

    Raises:
        RuntimeError: where a candidate left the GPU unusable, naming it.
    """
    calls: dict[str, Callable[[], object]] = {}
    for candidate in problem.left():
        tile = {problem.key: candidate.tile}
        try:
            with choosing(lambda key, own, tile=tile: tile.get(key, own)):  # type: ignore[misc]
                task.check()
            launches = _Recording(task, target, tile, True).launches[problem.key]
            calls[str(candidate.tile)] = _again(launches)
            calls[str(candidate.tile)]()
        except WrongResult as error:
            candidate.skipped = str(error)
        except Exception as error:  # of any kind: a candidate that fails is left out, and named
            candidate.skipped = describe_failure(error)
            _still_works(candidate)
    times = take_turns(calls, clock, rounds)
    for candidate in problem.left():
        candidate.seconds = statistics.median(times[str(candidate.tile)])


def _again(launches: list[offline.Launch]) -> Callable[[], object]:
    def again() -> None:
        for launch in launches:
            run(launch.kernel, launch.grid, launch.args, launch.kwargs)

    return again


def _still_works(candidate: Candidate) -> None:
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise RuntimeError(f"tile {candidate.tile} left the GPU unusable: {error}") from error


def best(problem: Problem, margin: float = 0.03) -> Candidate:
    """The fastest candidate; the tables' own unless another one is faster by ``margin``."""
    timed = [c for c in problem.left() if c.seconds is not None]
    if not timed:
        return problem.own
    fastest = min(timed, key=lambda c: c.seconds or math.inf)
    own = problem.own.seconds
    if own is not None and fastest.seconds is not None and fastest.seconds > (1 - margin) * own:
        return problem.own
    return fastest


def entry(problem: Problem) -> dict[str, Any]:
    """A problem's result as the table holds it."""
    kernel, kind, sizes = problem.key
    chosen = best(problem)
    return {
        "layer": problem.layer,
        "pass": problem.direction,
        "kernel": kernel,
        "kind": kind,
        "sizes": list(sizes),
        "tile": list(chosen.tile),
        "us": None if chosen.seconds is None else 1e6 * chosen.seconds,
        "own tile": list(problem.own.tile),
        "own us": None if problem.own.seconds is None else 1e6 * problem.own.seconds,
        "tried": [
            {"tile": list(c.tile), "us": c.seconds and 1e6 * c.seconds, "score": c.score}
            for c in problem.left()
        ],
        "skipped": [
            {"tile": list(c.tile), "why": c.skipped} for c in problem.candidates if c.skipped
        ],
    }
