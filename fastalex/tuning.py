"""Candidates for each choice that a step looks up: found, compiled, ranked, checked and timed."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastalex import offline
from fastalex.gpus import GPU
from fastalex.inspection import inspect
from fastalex.recorded_step import Event, Layer, Step
from fastalex.timing import Clock, take_turns
from fastalex.tuning_candidates import candidates, follows_tile
from fastalex.tuning_step import Call
from fastalex_kernels._tuned import Key, Tile
from fastalex_kernels.program import Launch, Program
from fastalex_kernels.reference import relative_error

ISSUE_BAR = 0.4  # instructions are issued in less than this share of the products' time
_OTHER_PLACES = 1e-3  # of a maximum: where two values are within rounding, either is right

_jobs: tuple[Sequence[Sequence[Launch]], str] = ([], "")  # what a forked process inherits


@dataclass
class Candidate:
    """A choice for one problem, and what became of it."""

    tile: Tile
    skipped: str | None = None
    seconds: float | None = None
    score: float | None = None  # share of the GPU's time, at best; computed
    launches: list[Launch] = field(default_factory=list)  # on tensors without data


@dataclass
class Problem:
    """What a pass of a layer looked up; the first candidate is the package's own choice."""

    layer: str
    phase: str
    key: Key
    candidates: list[Candidate]

    @property
    def own(self) -> Candidate:
        return self.candidates[0]

    def left(self) -> list[Candidate]:
        return [c for c in self.candidates if c.skipped is None]


def find_problems(
    calls: Iterable[Call],
    allowed: Callable[[Key, Tile], Iterator[Tile]],
    limit: int,
    taken: Mapping[Key, Tile],
    following: bool,
) -> list[Problem]:
    """The problems of passes on tensors without data, each with up to ``limit`` candidates.

    A tile that comes to the same launches as one before it is left out, and so is a reduction too
    short to be split.

    Args:
        calls: their launches are recorded, not run.
        allowed: the choices for a key and the package's own one.
        limit: candidates of a problem.
        taken: by the other problems.
        following: whether to find the problems that follow from a tile, or those of tiles.
    """
    problems: dict[Key, Problem] = {}
    for call in calls:
        for key, own in call.again(taken).own.items():
            if key in problems or follows_tile(key) is not following:
                continue
            seen: dict[str, Candidate] = {}
            for tile in allowed(key, own):
                launches = call.again({**taken, key: tile}).launches[key]
                seen.setdefault(_identity(launches), Candidate(tile, launches=launches))
                if len(seen) == limit:
                    break
            if len(seen) > 1 or not following:
                problems[key] = Problem(call.layer, call.phase, key, list(seen.values()))
    return list(problems.values())


def _identity(launches: list[Launch]) -> str:
    """What is launched, but for the tensors."""
    numbers = [[x for x in launch.arguments if isinstance(x, (int, str))] for launch in launches]
    return repr([(x.name, x.grid, n, x.options) for x, n in zip(launches, numbers, strict=True)])


def describe_failure(error: Exception) -> str:
    """One line that names an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def compile_all(
    jobs: Sequence[Sequence[Launch]], target: str, deadline: float = math.inf
) -> Iterator[str | None]:
    """Why the launches of each job can't be used, None where they can: they fail, spill, or do not
    fit.

    All cores but one compile them, and leave what they made in Triton's cache.

    Args:
        jobs: of launches on tensors without data; in order.
        target: one of ``offline.TARGETS``.
        deadline: by ``time.monotonic``; the iterator ends there.
    """
    global _jobs
    _jobs = (jobs, target)
    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    context = multiprocessing.get_context("fork")
    with context.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        results = pool.imap(_compile, range(len(jobs)))
        for _ in jobs:
            left = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
            try:
                result = results.next(left)
            except multiprocessing.TimeoutError:
                return
            yield result


def _compile(i: int) -> str | None:
    jobs, target = _jobs
    shared = offline.TARGETS[target].shared_limit
    for launch in jobs[i]:
        try:
            code = offline.read(offline.compile_launch(launch, target))
        except Exception as error:  # of any kind: a candidate that fails is left out, and named
            return describe_failure(error)
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
        events = [Event(problem.layer, problem.phase, x.name, x) for x in candidate.launches]
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
    call: Call,
    allowed: float,
    taken: Mapping[Key, Tile],
    clock: Clock,
    rounds: int,
) -> None:
    """Check each candidate that is left against the package's own choice, and time its launches.

    Args:
        problem: its candidates' times are filled in.
        call: the pass that looked it up. What it changes is as before in the end.
        allowed: relative error of a result.
        taken: by the other problems.
        clock: as ``clock_of`` gives it.
        rounds: times that each is timed.

    Raises:
        RuntimeError: where a candidate left the GPU unusable, naming it.
    """
    before = {name: x.clone() for name, x in call.changed().items()}

    def restore() -> None:
        for name, x in call.changed().items():
            x.copy_(before[name])

    expected = call.again({**taken, problem.key: problem.own.tile}).results
    runs: dict[str, Callable[[], object]] = {}
    for candidate in problem.left():
        restore()
        try:
            trace = call.again({**taken, problem.key: candidate.tile})
            candidate.skipped = _difference(trace.results, expected, allowed)
        except Exception as error:  # of any kind: a candidate that fails is left out, and named
            candidate.skipped = describe_failure(error)
            _still_works(candidate)
            continue
        timed = Program([x for x in call.given if x is not None])
        timed.launches = trace.launches[problem.key]
        if candidate.skipped is None:
            runs[str(candidate.tile)] = timed.run
    times = take_turns(runs, clock, rounds)
    for candidate in problem.left():
        candidate.seconds = statistics.median(times[str(candidate.tile)])
    restore()


def _difference(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], allowed: float
) -> str | None:
    """What differs by more than is allowed, and by how much."""
    for name, x in expected.items():
        if found[name] is x:  # an input
            continue
        bound, error = allowed, 0.0
        if x.is_floating_point():
            error = relative_error(found[name], x)
        else:
            bound, error = _OTHER_PLACES, float((found[name] != x).double().mean())
        if not error <= bound:  # NaN is wrong too
            what = name.strip("_")
            return f"{what} is {error:.1e} away from the own choice's, allowed are {bound:.1e}"
    return None


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
        "pass": problem.phase,
        "kernel": kernel,
        "kind": kind,
        "sizes": list(sizes),
        "tile": list(chosen.tile),
        "us": chosen.seconds and 1e6 * chosen.seconds,
        "own tile": list(problem.own.tile),
        "own us": problem.own.seconds and 1e6 * problem.own.seconds,
        "tried": [
            {"tile": list(c.tile), "us": c.seconds and 1e6 * c.seconds, "score": c.score}
            for c in problem.left()
        ],
        "skipped": [
            {"tile": list(c.tile), "why": c.skipped} for c in problem.candidates if c.skipped
        ],
    }
