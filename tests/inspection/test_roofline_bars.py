"""What the kernels must show in their machine code, at the sizes of AlexNet.

Every launch of a training step is held to the bars, for two GPUs, one GPU and a tower, and two
batches. What does not hold today stands in ``MISSED``, with its figure and the reason: such a test
must fail, so that an entry whose kernel was mended has to be taken out.

``python -m tests.inspection.test_roofline_bars`` prints what is missed now, as rows of the table.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import statistics
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import Any, NamedTuple

import pytest
import triton

from fastalex.inspection import roofline
from fastalex.inspection.report import Row
from fastalex_kernels.common.backend import interpreted

pytestmark = [
    pytest.mark.skipif(interpreted(), reason="an interpreted kernel has no machine code"),
    pytest.mark.skipif(
        tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
        reason="the figures are of the machine code of Triton 3.9",
    ),
]


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
    ours = [layer for layer in found["layers"] if layer["layer"].startswith("fc")]
    update = 18 * found["summary"]["linear_parameters"]
    floor = sum(layer["floor_size"] for layer in ours) + update
    return {"fc6 fc7 fc8": sum(layer["size"] for layer in ours) / floor}


class Bar(NamedTuple):
    """A figure of everything it applies to, and its limit; ``at_least`` says on which side.

    ``absent`` are cases in which it applies to nothing.
    """

    figures: Callable[[Case], Figures]
    limit: float
    at_least: bool = False
    absent: tuple[Case, ...] = ()

    def holds(self, figure: float) -> bool:
        return figure >= self.limit if self.at_least else figure <= self.limit


def _summary(key: str) -> Callable[[Case], Figures]:
    return lambda case: {"step": report(case)["summary"][key]}


A100 = tuple(case for case in CASES if case.gpu == "a100")  # it has no TMA
TOWERS = tuple(case for case in CASES if case.gpus == 2)
LATE = ("conv2", "conv3", "conv4", "conv5")
BARS = {
    "local memory": Bar(_each(lambda row: float(row.spills or row.stack or 0)), 0),
    "operands through registers": Bar(_each(_products(lambda row: row.register_operands)), 0),
    "narrow accesses": Bar(_each(_narrow), 1),
    "drains": Bar(_each(_products(lambda row: row.drains)), 0),
    "memory barriers": Bar(_each(_barriers), 0, absent=A100),
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
    "waves": Bar(_waves, 0.85, at_least=True, absent=TOWERS),
    "mean waves": Bar(_mean_waves, 0.90, at_least=True, absent=TOWERS),
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


class Missed(NamedTuple):
    """What a bar asks for and does not get today.

    Args:
        bar: a key of ``BARS``.
        what: the launch, named as in the report: layer and pass, or layer, phase and kernel.
        figure: the worst of its figures.
        where: patterns of the cases it is missed in, separated by commas.
        why: the reason.
    """

    bar: str
    what: str
    figure: float
    where: str
    why: str

    @property
    def cases(self) -> list[Case]:
        patterns = self.where.split(", ")
        return [case for case in CASES if any(fnmatch(str(case), p) for p in patterns)]


# Why, for MISSED.
COLUMNS_1000 = "fc8 has 1000 columns, which 16 and 128 do not divide"
DRAINED = "two products a step share a sum: two programs a processor cover for each other"
ONE_NUMBER = "one number of each program, 128 bytes in all"
SHORT_TAPS = "9 short steps a program, and the first loads and last stores between"
SPLIT_48 = "48 channels are taken as 32 + 16, two short products a step"
COLUMNS_48 = "48 outputs in 64 columns: no number of rows makes 64 of that"
ROWS_48 = "48 input channels in 64 rows"
MASKED_SUM = "a sum of 1000 is masked in its last block, and so in every one"
SHORT_PROGRAMS = "a program computes one row more than it keeps, of few"
SHORT_BACKWARD = "two windows are loaded before the first of few rows"
SPLIT_SUMS = "float32 sums of split products, and bias sums, stored and read"
PADDED_WEIGHT = "the copy of conv1's weight that products read is padded to 12 x 12"
OPERATORS = "the exchange by torch, whose halves are put together and added up apart"
SHORT_SUMS = "of a bias each thread sums many parts of one element; of a weight, copies are 2 bytes"
FEW_STEPS = "two steps a program at batch 128: bound by 18 bytes a parameter, not by issue"
LAST_BYTES = "of 12 bytes that start anywhere, two loads of 8 leave up to 4, which are loaded alone"
MASKED_SUMS = "the bias sums of the ReLU before it, in place of a pass over the activation"

MISSED = [
    Missed(*missed)
    for missed in (
        ("narrow accesses", "augment forward", 2.0, "*", LAST_BYTES),
        ("narrow accesses", "fc8 forward finish_partials", 8.0, "* 128", COLUMNS_1000),
        ("narrow accesses", "loss forward sum_partials", 4.0, "*", ONE_NUMBER),
        ("narrow accesses", "pool5 backward", 4.0, "*", MASKED_SUMS),
        ("narrow accesses", "conv5 backward sum_update", 8.0, "*", SHORT_SUMS),
        ("narrow accesses", "conv4 backward sum_update", 8.0, "*", SHORT_SUMS),
        ("narrow accesses", "conv3 backward sum_update", 8.0, "*", SHORT_SUMS),
        ("narrow accesses", "conv2 backward sum_update", 8.0, "*", SHORT_SUMS),
        ("narrow accesses", "conv1 backward sum_update", 8.0, "*", PADDED_WEIGHT),
        ("drains", "conv1 forward", 1, "h100 *", DRAINED),
        ("drains", "conv2 forward", 1, "h100 *", DRAINED),
        ("issue ratio", "conv2 forward", 0.71, "*", SPLIT_48),
        ("issue ratio", "fc8 weight", 0.43, "h100 *", FEW_STEPS),
        ("issue ratio", "fc7 weight", 0.43, "h100 *", FEW_STEPS),
        ("issue ratio", "fc6 weight", 0.43, "h100 *", FEW_STEPS),
        ("issue ratio", "conv2 input", 0.44, "h100 *", COLUMNS_48),
        ("issue ratio", "conv2 weight", 0.41, "h100 *", ROWS_48),
        ("issue ratio", "fc8 input", 0.41, "a100 *", MASKED_SUM),
        ("useful share of conv1", "conv1 weight", 0.56, "*", ROWS_48),
        ("waves", "conv1 forward", 0.78, "h100 whole *, * whole 128", SHORT_TAPS),
        ("tile intensity", "conv2 input", 42.67, "*", COLUMNS_48),
        ("tile intensity", "conv1 forward", 42.67, "* tower *", COLUMNS_48),
        ("tile intensity", "conv1 weight", 48.0, "* tower *", ROWS_48),
        ("instructions forward", "pool1 forward", 19.95, "*", SHORT_PROGRAMS),
        ("instructions forward", "pool2 forward", 23.29, "*", SHORT_PROGRAMS),
        ("instructions backward", "pool2 backward", 42.14, "*", SHORT_BACKWARD),
        ("instructions backward", "pool1 backward", 47.78, "*", SHORT_BACKWARD),
        ("bytes of fully connected layers", "fc6 fc7 fc8", 1.19, "* tower *", SPLIT_SUMS),
        ("bytes of the update", "step", 18.0, "*", PADDED_WEIGHT),
        ("launches", "step", 58, "* tower *", OPERATORS),
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", BARS)
def test_bar(name: str, case: Case) -> None:
    bar = BARS[name]
    missed = {m.what for m in MISSED if m.bar == name and case in m.cases}
    figures = bar.figures(case)
    assert figures or case in bar.absent, "nothing was looked at"
    over = {what: f for what, f in figures.items() if not bar.holds(f) and what not in missed}
    assert not over, f"{name}: limit {bar.limit:g} on {case}"


@pytest.mark.parametrize(
    "missed",
    [
        pytest.param(
            m,
            id=f"{m.bar} - {m.what}",
            marks=pytest.mark.xfail(
                strict=True, raises=AssertionError, reason=f"{m.figure:g} ({m.where}): {m.why}"
            ),
        )
        for m in MISSED
    ],
)
def test_missed(missed: Missed) -> None:
    """Fails for as long as the bar is missed in every case of the entry."""
    bar = BARS[missed.bar]
    figures = {str(case): bar.figures(case)[missed.what] for case in missed.cases}
    assert any(map(bar.holds, figures.values())), f"{figures}, limit {bar.limit:g}"


_PATTERNS = ("*", "h100 *", "a100 *", "* 128", "* 1024", "* whole *", "* tower *", "h100 whole *",
             "h100 tower *", "a100 whole *", "a100 tower *", "* whole 128", "* whole 1024",
             "* tower 128", "* tower 1024", *map(str, CASES))  # fmt: skip


def _where(cases: list[str]) -> str:
    """The fewest of ``_PATTERNS`` that match these cases and no others, the widest first."""
    left, chosen = set(cases), []
    for pattern in _PATTERNS:
        matched = {str(case) for case in CASES if fnmatch(str(case), pattern)}
        if matched <= set(cases) and matched & left:
            chosen.append(pattern)
            left -= matched
    return ", ".join(chosen)


def _print_missed() -> None:
    reasons = {(m.bar, m.what): m.why for m in MISSED}
    for name, bar in BARS.items():
        found: dict[str, dict[str, float]] = {}
        for case in CASES:
            for what, figure in bar.figures(case).items():
                if not bar.holds(figure):
                    found.setdefault(what, {})[str(case)] = figure
        for what, figures in found.items():
            worst = (min if bar.at_least else max)(figures.values())
            entry = (name, what, round(worst, 2), _where(list(figures)))
            print(f"Missed{(*entry, reasons.get((name, what), '?'))},")


if __name__ == "__main__":
    _print_missed()
