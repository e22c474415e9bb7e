"""Candidates for each choice that a step looks up: found, compiled, ranked, checked and timed."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastalex.common.timing import Clock, take_turns
from fastalex.inspection import offline
from fastalex.inspection.gpus import GPU
from fastalex.inspection.record import Event, Layer, Step
from fastalex.inspection.report import inspect
from fastalex.tuning.candidates import candidates, follows_tile
from fastalex.tuning.workloads import Call, Trace
from fastalex_kernels.common.backend import record_launches
from fastalex_kernels.common.program import Launch
from fastalex_kernels.common.tuned import Key, Tile
from fastalex_kernels.reference import relative_error

ISSUE_BAR = 0.4  # instructions are issued in less than this share of the products' time
_MARGIN = 0.03  # of time, by which a candidate has to beat the package's own choice
_OTHER_PLACES = 1e-3  # of a maximum: where two values are within rounding, either is right

Jobs = Sequence[Sequence[Launch]]
_jobs: tuple[Jobs, str] = ([], "")  # what a forked process inherits


class UnusableGPU(OSError):
    """A candidate left the GPU in an error that stays; the message names it."""


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

    def best(self) -> Candidate:
        """The fastest candidate; the package's own unless another one is clearly faster."""
        timed = [(c.seconds, c) for c in self.left() if c.seconds is not None]
        seconds, fastest = min(timed, key=lambda t: t[0], default=(0.0, self.own))
        own = self.own.seconds if self.own.skipped is None else None
        return self.own if own is not None and seconds > (1 - _MARGIN) * own else fastest

    def entry(self) -> dict[str, Any]:
        """The result as a table holds it."""
        kernel, kind, sizes = self.key
        best, own = self.best(), self.own
        tried = [{"tile": list(c.tile), "us": _us(c), "score": c.score} for c in self.left()]
        skipped = [{"tile": list(c.tile), "why": c.skipped} for c in self.candidates if c.skipped]
        return {
            "layer": self.layer, "pass": self.phase, "kernel": kernel, "kind": kind,
            "sizes": list(sizes), "tile": list(best.tile), "us": _us(best),
            "own tile": list(own.tile), "own us": _us(own), "tried": tried, "skipped": skipped,
        }  # fmt: skip


def _us(candidate: Candidate) -> float | None:
    return None if candidate.seconds is None else 1e6 * candidate.seconds


class Search:
    """The problems of a step, each with candidates that are compiled.

    Iterating gives those of tiles, then those that follow from the best of them: a problem's times
    are filled in before the next one is taken. It ends when time is up.

    Args:
        calls: passes on tensors without data.
        target: as ``fastalex_kernels`` names it.
        limit: candidates of a problem.
        seconds: for all of it.
        first: launches to be compiled before.

    Attributes:
        found: the problems so far.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        target: str,
        limit: int,
        seconds: float = math.inf,
        first: Sequence[Launch] = (),
    ) -> None:
        self.found: list[Problem] = []
        self._calls, self._target, self._limit, self._first = calls, target, limit, first
        self._deadline = time.monotonic() + seconds

    def __iter__(self) -> Iterator[Problem]:
        for following in (False, True):
            problems = self._find({p.key: p.best().tile for p in self.found}, following)
            self.found += problems
            tried = [c for problem in problems for c in problem.candidates[1:]]
            first = [] if following else [[launch] for launch in self._first]
            compiled = self._compiled([*first, *(c.launches for c in tried)])
            for _ in zip(first, compiled, strict=False):
                pass
            for problem in problems:
                for candidate, why in zip(problem.candidates[1:], compiled, strict=False):
                    candidate.skipped = why
                if self._late():
                    return
                yield problem

    def _late(self) -> bool:
        return time.monotonic() > self._deadline

    def _compiled(self, jobs: Jobs) -> Iterator[str | None]:
        """``compile_all`` until time is up, where there is something to compile for."""
        if self._target not in offline.TARGETS:
            return itertools.repeat(None)
        return itertools.takewhile(lambda _: not self._late(), compile_all(jobs, self._target))

    def _find(self, taken: Mapping[Key, Tile], following: bool) -> list[Problem]:
        """The problems that follow from the tiles ``taken``, or those of tiles.

        A tile that comes to the same launches as one before it is left out, and so is a reduction
        too short to be split.
        """
        problems: dict[Key, Problem] = {}
        known = offline.TARGETS.get(self._target)
        shared = known.shared_limit if known else 1 << 30
        with record_launches(self._target, lambda *_: None):
            for call in self._calls:
                assert call.given[0] is not None
                bits = 8 * call.given[0].element_size()
                trace = call.again(taken)
                for key, own in trace.own.items():
                    launched = trace.launches[key]  # nothing, where it was only asked for
                    if key in problems or follows_tile(key) is not following or not launched:
                        continue
                    seen: dict[str, Candidate] = {}
                    for tile in candidates(key, own, self._target, bits, shared):
                        launches = call.again({**taken, key: tile}).launches[key]
                        seen.setdefault(_identity(launches), Candidate(tile, launches=launches))
                        if len(seen) == self._limit:
                            break
                    if len(seen) > 1 or not following:
                        found = list(seen.values())
                        problems[key] = Problem(call.layer, call.phase, key, found)
        return list(problems.values())


def _identity(launches: list[Launch]) -> str:
    """What is launched, but for the tensors."""
    numbers = [[x for x in launch.arguments if isinstance(x, (int, str))] for launch in launches]
    return repr([(x.name, x.grid, n, x.options) for x, n in zip(launches, numbers, strict=True)])


def compile_all(jobs: Jobs, target: str) -> Iterator[str | None]:
    """Why each job's launches can't be used, None where they can: they fail, spill or do not fit.

    All cores but one compile and read them, in order, and leave what they made in Triton's cache.

    Args:
        jobs: of launches on tensors without data.
        target: one of ``offline.TARGETS``.
    """
    global _jobs
    _jobs = (jobs, target)
    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    context = multiprocessing.get_context("fork")
    with context.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.imap(_compile, range(len(jobs)))


def _compile(i: int) -> str | None:
    jobs, target = _jobs
    shared = offline.TARGETS[target].shared_limit
    for launch in jobs[i]:
        try:
            code = offline.read(offline.compile_launch(launch, target))
        except Exception as error:  # of any kind: a candidate that fails is left out, and named
            return _describe(error)
        if code.spills or code.stack:
            return f"{launch.name} spills ({code.spills} instructions, {code.stack} bytes)"
        if code.shared > shared:
            return f"{launch.name} needs {code.shared} bytes of shared memory, there are {shared}"
    return None


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


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
        row = next((row for row in rows if row.mma), rows[0])
        if row.waves and row.issue_ratio:
            useful = 1.0 if row.useful is None else min(row.useful, 1.0)
            candidate.score = row.waves * useful * min(1.0, ISSUE_BAR / row.issue_ratio)
        elif row.issue_seconds:
            size = row.read + row.written
            candidate.score = min(1.0, gpu.seconds(0.0, size, dtype) / row.issue_seconds)


def time_candidates(
    problem: Problem, call: Call, taken: Mapping[Key, Tile], clock: Clock, rounds: int
) -> None:
    """Check each candidate that is left against the package's own choice, and time its launches.

    Args:
        problem: its candidates' times are filled in.
        call: the pass that looked it up, of a step that was run. In the end nothing is changed.
        taken: by the other problems.
        clock: as ``clock_of`` gives it.
        rounds: times that each is timed.

    Raises:
        UnusableGPU: after a candidate that left it so.
    """
    before = [x.clone() for x in call.changed()]

    def restore() -> None:
        for x, value in zip(call.changed(), before, strict=True):
            x.copy_(value)

    def run(tile: Tile) -> Trace:
        restore()
        return call.again({**taken, problem.key: tile})

    expected = run(problem.own.tile).results
    runs: dict[str, Callable[[], object]] = {}
    for candidate in problem.left():
        try:
            trace = run(candidate.tile)
            candidate.skipped = _difference(trace.results, expected, call.allowed())
        except Exception as error:  # of any kind: a candidate that fails is left out, and named
            candidate.skipped = _describe(error)
            _still_works(candidate)
        if candidate.skipped is None:
            timed = call.program()
            timed.launches = trace.launches[problem.key]
            runs[str(candidate.tile)] = timed.run
    times = take_turns(runs, clock, rounds)
    for candidate in problem.left():
        candidate.seconds = statistics.median(times[str(candidate.tile)])
    restore()


def _difference(
    found: list[torch.Tensor], expected: list[torch.Tensor], allowed: float
) -> str | None:
    """By how much results differ, where it is more than is allowed."""
    for x, reference in zip(found, expected, strict=True):
        bound, error = allowed, 0.0
        if x.is_floating_point():
            error = relative_error(x, reference)
        else:
            bound, error = _OTHER_PLACES, float((x != reference).double().mean())
        if not error <= bound:  # NaN is wrong too
            return f"a result is {error:.1e} away from the own choice's, allowed are {bound:.1e}"
    return None


def _still_works(candidate: Candidate) -> None:
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        what = f"tile {candidate.tile} left the GPU unusable: {_describe(error)}"
        raise UnusableGPU(what) from error
