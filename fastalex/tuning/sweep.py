"""Autotuning: for each key that a step looks up, candidates are compiled, checked and timed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastalex.common.compile import TARGETS, Compiled, compile_ahead, compile_launch, first_line
from fastalex.common.timing import Clock, take_turns
from fastalex.inspection import offline
from fastalex.inspection.gpus import GPU
from fastalex.inspection.record import Event, Layer, Step
from fastalex.inspection.report import inspect
from fastalex.tuning.candidates import candidates, is_split
from fastalex.tuning.workloads import Trace, Workload
from fastalex_kernels.common.backend import record_launches
from fastalex_kernels.common.program import Launch
from fastalex_kernels.common.tuned import Key, Tile
from fastalex_kernels.reference import relative_error

_MARGIN = 0.03  # of time, by which a candidate has to beat the package's own config
_OTHER_PLACES = 1e-3  # of a maximum: where two values are within rounding, either is right


class UnusableGPU(OSError):
    """A candidate left the GPU in an error that stays; the message names it."""


@dataclass
class Config:
    """A candidate for one key, and what became of it."""

    tile: Tile
    launches: Sequence[Launch] = ()  # on tensors without data
    skipped: str | None = None  # why
    us: float | None = None  # timed, or estimated


@dataclass
class Entry:
    """A key that a pass of a layer looks up; the first config is the package's own."""

    layer: str
    phase: str
    key: Key
    configs: list[Config]

    @property
    def own(self) -> Config:
        return self.configs[0]

    def left(self) -> list[Config]:
        return [config for config in self.configs if config.skipped is None]

    def best(self) -> Config:
        """The fastest config; the package's own unless another one is clearly faster."""
        known = [(c.us, c) for c in self.left() if c.us is not None]
        us, fastest = min(known, key=lambda pair: pair[0], default=(0.0, self.own))
        own = self.own.us if self.own.skipped is None else None
        return self.own if own is not None and us > (1 - _MARGIN) * own else fastest

    def as_row(self) -> dict[str, Any]:
        """The entry as a table holds it."""
        kernel, kind, sizes = self.key
        best, own = self.best(), self.own
        return {
            "layer": self.layer, "pass": self.phase, "kernel": kernel, "kind": kind,
            "sizes": list(sizes), "tile": list(best.tile), "us": best.us,
            "own tile": list(own.tile), "own us": own.us,
            "tried": [{"tile": list(c.tile), "us": c.us} for c in self.left()],
            "skipped": [
                {"tile": list(c.tile), "why": c.skipped} for c in self.configs if c.skipped
            ],
        }  # fmt: skip


def autotune(
    workloads: Sequence[Workload],
    target: str,
    limit: int,
    measure: Callable[[Entry, dict[Key, Tile]], None],
) -> Iterator[Entry]:
    """Find the best config for every key that ``workloads`` look up.

    Tiles come first, then the splits of a reduction, whose keys follow from the best tiles. What
    comes next compiles while an entry is measured.

    Args:
        workloads: on tensors without data.
        target: as ``fastalex_kernels`` names it.
        limit: candidates for a key.
        measure: times or estimates the configs of an entry, given the best tiles so far.

    Yields:
        Every entry, in order.
    """
    best: dict[Key, Tile] = {}
    for splits in (False, True):
        entries = find(workloads, target, limit, best, splits)
        jobs = [config.launches for entry in entries for config in entry.configs[1:]]
        compiled: Iterator[Compiled] = itertools.repeat(Compiled(None, 0.0))
        if target in TARGETS:
            compiled = compile_ahead(jobs, target, unfit)
        for entry in entries:
            for config in entry.configs[1:]:
                config.skipped = next(compiled).failure
            measure(entry, best)
            best[entry.key] = entry.best().tile
            yield entry


def unfit(launch: Launch, target: str) -> str | None:
    """Why a launch should not be made: it spills, or needs more shared memory than there is."""
    code, limit = offline.read(compile_launch(launch, target)), TARGETS[target].shared_limit
    if code.spills or code.stack:
        return f"{launch.name} spills ({code.spills} instructions, {code.stack} bytes)"
    if code.shared > limit:
        return f"{launch.name} needs {code.shared} bytes of shared memory, there are {limit}"
    return None


def find(
    workloads: Sequence[Workload], target: str, limit: int, best: Mapping[Key, Tile], splits: bool
) -> list[Entry]:
    """The keys of splits that follow from the ``best`` tiles, or those of tiles, with candidates.

    A tile that comes to the same launches as one before it is left out, and so is a reduction too
    short to be split.
    """
    entries: dict[Key, Entry] = {}
    shared = TARGETS[target].shared_limit if target in TARGETS else 1 << 30
    with record_launches(target, lambda *_: None):
        for workload in workloads:
            trace = workload.run(best)
            for key, own in trace.own.items():
                if key in entries or is_split(key) is not splits:
                    continue
                seen: dict[str, Config] = {}
                for tile in candidates(key, own, workload.bits, shared):
                    launches = workload.run({**best, key: tile}).launches[key]
                    seen.setdefault(_identity(launches), Config(tile, launches))
                    if len(seen) == limit:
                        break
                if len(seen) > 1 or not splits:
                    found = list(seen.values())
                    entries[key] = Entry(workload.layer, workload.phase, key, found)
    return list(entries.values())


def _identity(launches: list[Launch]) -> str:
    """What is launched, but for the tensors."""
    numbers = [[x for x in launch.arguments if isinstance(x, (int, str))] for launch in launches]
    return repr([(x.name, x.grid, n, x.options) for x, n in zip(launches, numbers, strict=True)])


def rank(entry: Entry, layer: Layer, gpu: GPU, dtype: str) -> None:
    """Estimate each config that is left from its machine code, without running it."""
    for config in entry.left():
        events = [Event(entry.layer, entry.phase, x.name, x) for x in config.launches]
        made = [row.estimate for row in inspect(Step(events, {entry.layer: layer}), gpu, dtype)]
        config.us = 1e6 * sum(one.middle for one in made if one is not None) or None


def time_configs(
    entry: Entry, workload: Workload, best: Mapping[Key, Tile], clock: Clock, rounds: int
) -> None:
    """Check each config that is left against the package's own, and time its launches.

    Args:
        entry: its configs' times are filled in.
        workload: the pass that looked it up, of a step that was run. In the end nothing is changed.
        best: tiles of the other keys.
        clock: as ``clock_of`` gives it.
        rounds: times that each is timed.

    Raises:
        UnusableGPU: after a candidate that left it so.
    """
    before = [x.clone() for x in workload.changed()]

    def restore() -> None:
        for x, value in zip(workload.changed(), before, strict=True):
            x.copy_(value)

    def run(tile: Tile) -> Trace:
        restore()
        return workload.run({**best, entry.key: tile})

    expected = run(entry.own.tile).results
    runs: dict[str, Callable[[], object]] = {}
    for config in entry.left():
        try:
            trace = run(config.tile)
            config.skipped = _difference(trace.results, expected, workload.tolerance())
        except Exception as error:  # of any kind: a candidate that fails is left out, and named
            config.skipped = first_line(error)
            _check_gpu(config)
        if config.skipped is None:
            program = workload.program()
            program.launches = trace.launches[entry.key]
            runs[str(config.tile)] = program.run
    times = take_turns(runs, clock, rounds)
    for config in entry.left():
        config.us = 1e6 * statistics.median(times[str(config.tile)])
    restore()


def _difference(
    found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float
) -> str | None:
    """By how much results differ, where it is more than the tolerance."""
    for x, reference in zip(found, expected, strict=True):
        if x.is_floating_point():
            bound, error = tolerance, relative_error(x, reference)
        else:
            bound, error = _OTHER_PLACES, float((x != reference).double().mean())
        if not error <= bound:  # NaN is wrong too
            return f"a result is {error:.1e} away from the own config's, allowed are {bound:.1e}"
    return None


def _check_gpu(config: Config) -> None:
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        what = f"tile {config.tile} left the GPU unusable: {first_line(error)}"
        raise UnusableGPU(what) from error
