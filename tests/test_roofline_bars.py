"""What the kernels must show in their machine code, at the sizes of AlexNet.

Every launch of a training step is held to the bars, for two GPUs, one GPU and a tower, and two
batches. What does not hold today stands in ``MISSED``, with its figure and the reason: such a test
must fail, so that an entry whose kernel was mended has to be taken out.

``python -m tests.test_roofline_bars`` prints what is missed now, in the form of the table.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from fastalex import roofline
from fastalex.inspection import Row
from fastalex_kernels._launch import interpreted

pytestmark = pytest.mark.skipif(interpreted(), reason="an interpreted kernel has no machine code")


class Case(NamedTuple):
    """A step that is looked at: a GPU, GPUs that share the net, images."""

    gpu: str
    gpus: int
    batch: int

    def __str__(self) -> str:
        return f"{self.gpu} {'tower' if self.gpus == 2 else 'whole'} {self.batch}"


CASES = [Case(g, n, b) for g in ("h100", "a100") for n in (1, 2) for b in (128, 1024)]
Figures = dict[str, float]  # what is looked at, and its figure


@functools.cache
def report(case: Case) -> dict[str, Any]:
    output = io.StringIO()
    arguments = [f"--{name}={value}" for name, value in case._asdict().items()]
    with contextlib.redirect_stdout(output):
        assert roofline.main([*arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(output.getvalue())
    return result


def _rows(case: Case) -> Iterator[tuple[str, Row]]:
    """Every launch of ours by a name of its own."""
    for launch in report(case)["launches"]:
        row = Row(**launch)
        if row.grid is not None:
            kernel = row.name.strip("_").removesuffix("_kernel")
            yield f"{row.layer} {row.role or f'{row.phase} {kernel}'}", row


def _each(figure: Callable[[Row], float | None], *layers: str) -> Callable[[Case], Figures]:
    def figures(case: Case) -> Figures:
        found: Figures = {}
        for name, row in _rows(case):
            value = figure(row)
            if value is not None and (not layers or name.startswith(layers)):
                found[name] = max(found.get(name, value), value)
        return found

    return figures


def _products(value: Callable[[Row], float | None]) -> Callable[[Row], float | None]:
    return lambda row: value(row) if row.tile else None


def _narrow(row: Row) -> float:
    """How many times narrower than asked for the narrowest access to a carrying argument is."""
    worst = 1.0
    for accesses in (row.loads, row.stores):
        for name in row.carriers() & set(accesses):
            wanted = min(8 * row.itemsizes.get(name, 2), 16)
            widths = [int(w) for w in accesses[name] if w != "TMA"]
            if row.layer.startswith("pool") and name == "x_ptr" and max(widths) == 16:
                widths = [w for w in widths if w != 4]  # the neighbouring channels of a chunk
            worst = max([worst, *(wanted / w for w in widths)])
    return worst


def _barriers(row: Row) -> float | None:
    tma = "TMA" in row.widths(store=False)
    return row.barriers if row.tile and tma else None


def _waves(case: Case) -> Figures:
    if case.gpus == 2:
        return {}
    figures = {
        name: row.waves
        for name, row in _rows(case)
        if name.startswith("conv") and row.waves is not None
    }
    return figures


def _mean_waves(case: Case) -> Figures:
    figures = _waves(case)
    return {"all convolutions": statistics.fmean(figures.values())} if figures else {}


def _pool_bytes(case: Case) -> Figures:
    return {
        f"{layer['layer']} {layer['phase']}": layer["size"] / layer["floor_size"]
        for layer in report(case)["layers"]
        if layer["layer"] in ("pool1", "pool2")
    }


def _linear_bytes(case: Case) -> Figures:
    """Of the fully connected layers, their part of the update included."""
    found = report(case)
    summary, layers = found["summary"], found["layers"]
    ours = [layer for layer in layers if layer["layer"].startswith("fc")]
    share = summary["linear_parameters"] / summary["parameters"]
    update = sum(layer["size"] for layer in layers if layer["layer"] == "optimizer")
    floor = sum(layer["floor_size"] for layer in ours) + 18 * summary["linear_parameters"]
    return {"fc6 fc7 fc8": (sum(layer["size"] for layer in ours) + share * update) / floor}


class Bar(NamedTuple):
    """A figure of everything it applies to, and its limit; ``at_least`` says on which side."""

    figures: Callable[[Case], Figures]
    limit: float
    at_least: bool = False

    def holds(self, figure: float) -> bool:
        return figure >= self.limit if self.at_least else figure <= self.limit


def _summary(key: str) -> Callable[[Case], Figures]:
    return lambda case: {"step": report(case)["summary"][key]}


LATE = ("conv2", "conv3", "conv4", "conv5")
BARS = {
    "local memory": Bar(_each(lambda row: float(row.spills or row.stack or 0)), 0),
    "operands through registers": Bar(_each(_products(lambda row: row.register_operands)), 0),
    "narrow accesses": Bar(_each(_narrow), 1),
    "drains": Bar(_each(_products(lambda row: row.drains)), 0),
    "memory barriers": Bar(_each(_barriers), 0),
    "loops with products": Bar(_each(_products(lambda row: row.mma_loops)), 1),
    "issue ratio": Bar(_each(_products(lambda row: row.issue_ratio), *LATE, "fc"), 0.40),
    "issue ratio of conv1": Bar(_each(_products(lambda row: row.issue_ratio), "conv1"), 0.80),
    "useful share forward": Bar(
        _each(lambda row: row.useful if row.tile and row.role == "forward" else None, *LATE),
        0.93,
        at_least=True,
    ),
    "useful share of conv2's input": Bar(
        _each(lambda row: row.useful, "conv2 input"), 0.75 - 1e-6, at_least=True
    ),
    "useful share of conv1": Bar(_each(lambda row: row.useful, "conv1"), 0.72, at_least=True),
    "waves": Bar(_waves, 0.85, at_least=True),
    "mean waves": Bar(_mean_waves, 0.90, at_least=True),
    "tile intensity": Bar(
        _each(lambda r: r.tile[0] * r.tile[1] / sum(r.tile) if r.tile else None, "conv"),
        64,
        at_least=True,
    ),
    "instructions forward": Bar(
        _each(lambda r: r.instructions if r.role == "forward" else None, "pool1", "pool2"), 16
    ),
    "instructions backward": Bar(
        _each(lambda r: r.instructions if r.role == "backward" else None, "pool1", "pool2"), 36
    ),
    "bytes of LRN + pool": Bar(_pool_bytes, 1.10),
    "bytes of fully connected layers": Bar(_linear_bytes, 1.05),
    "bytes of the update": Bar(_summary("optimizer_bytes_per_parameter"), 18),
    "launches": Bar(_summary("launches"), 45),
}

# bar: what misses it: (why, {case: figure})
MISSED: dict[str, dict[str, tuple[str, dict[str, float]]]] = {}


def _missed(name: str) -> set[tuple[str, str]]:
    return {(what, case) for what, (_, cases) in MISSED.get(name, {}).items() for case in cases}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", BARS)
def test_bar(name: str, case: Case) -> None:
    bar, missed = BARS[name], _missed(name)
    over = {
        what: figure
        for what, figure in bar.figures(case).items()
        if not bar.holds(figure) and (what, str(case)) not in missed
    }
    assert not over, f"{name}: limit {bar.limit:g} on {case}"


ENTRIES = [
    pytest.param(name, what, case, id=f"{name}-{what}-{case}", marks=pytest.mark.xfail(
        strict=True, raises=AssertionError, reason=f"{figure:g}: {why}"
    ))
    for name, found in MISSED.items()
    for what, (why, cases) in found.items()
    for case, figure in cases.items()
]  # fmt: skip


@pytest.mark.parametrize(("name", "what", "case"), ENTRIES)
def test_missed(name: str, what: str, case: str) -> None:
    bar, of = BARS[name], next(c for c in CASES if str(c) == case)
    figure = bar.figures(of)[what]
    assert bar.holds(figure), f"{figure:g}, limit {bar.limit:g}"


def _print_missed() -> None:
    for name, bar in BARS.items():
        found: dict[str, dict[str, float]] = {}
        for case in CASES:
            for what, figure in bar.figures(case).items():
                if not bar.holds(figure):
                    found.setdefault(what, {})[str(case)] = round(figure, 2)
        if found:
            print(f"{name} (limit {bar.limit:g}):")
        for what, figures in found.items():
            print(f"    {what}: {figures}")


if __name__ == "__main__":
    _print_missed()
