"""Sweep of tiles: what each candidate for a problem makes of it, compiled, computed or timed."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastalex import offline
from fastalex.gpus import GPU
from fastalex.inspection import inspect
from fastalex.layer_pairs import WrongResult
from fastalex.recorded_step import Event, Layer, Step
from fastalex.timing import Clock, take_turns
from fastalex.tuning_problems import Candidate, Problem, Recording, Task
from fastalex_kernels._launch import run
from fastalex_kernels._tuned import Key, Tile, choosing

ISSUE_BAR = 0.4  # instructions are issued in less than this share of the products' time

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

    With products the score is the share of the tensor cores' time that real operations can fill:
    the simulated waves, times the useful share of the tile, less what issuing the loop takes
    beyond the bar. Without, it is the time that the bytes take over the time to issue the
    instructions, in simulated waves too, at most 1.
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
        row = next((row for row in rows if row.mma), next(iter(rows), None))
        if row is None:
            continue
        if row.waves and row.issue_ratio:
            useful = 1.0 if row.useful is None else min(row.useful, 1.0)
            candidate.score = row.waves * useful * min(1.0, ISSUE_BAR / row.issue_ratio)
        elif row.issue_seconds:
            size = row.read + row.written
            candidate.score = min(1.0, gpu.seconds(0.0, size, dtype) / row.issue_seconds)


def time_candidates(
    problem: Problem,
    task: Task,
    target: str,
    clock: Clock,
    rounds: int,
    settled: Mapping[Key, Tile],
) -> None:
    """Check each candidate that is left against float64, and time its launches.

    Args:
        problem: its candidates' times are filled in.
        task: the pass that poses it.
        target: as ``fastalex_kernels`` names it.
        clock: as ``clock_of`` gives it.
        rounds: times that each is timed.
        settled: tiles that are taken for other problems.

    Raises:
        RuntimeError: where a candidate left the GPU unusable, naming it.
    """
    calls: dict[str, Callable[[], object]] = {}
    for candidate in problem.left():
        tile = {**settled, problem.key: candidate.tile}
        try:
            with choosing(lambda key, own, tile=tile: tile.get(key, own)):  # type: ignore[misc]
                task.check()
            launches = Recording(task, target, tile, True).launches[problem.key]
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
