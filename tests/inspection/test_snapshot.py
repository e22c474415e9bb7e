"""The machine code of a training step is no worse than its snapshot, and meets its bars."""

from __future__ import annotations

import json

import pytest
import triton

from fastalex_kernels.common.backend import interpreted
from tests.inspection.snapshot import BARS, CASES, PAGE, PATH, failures, measure, page

HELD = json.loads(PATH.read_text())


@pytest.mark.slow
@pytest.mark.skipif(interpreted(), reason="an interpreted kernel has no machine code")
@pytest.mark.skipif(
    triton.__version__ != HELD["triton"], reason="the figures are of another Triton's machine code"
)
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_worse_than_its_snapshot(case: str) -> None:
    assert not failures(measure(case), HELD["cases"][case], case)


def test_the_snapshot_meets_the_bars_or_says_why_not() -> None:
    assert list(HELD["cases"]) == list(CASES)
    for case, figures in HELD["cases"].items():
        assert not failures(figures, figures, case)
    names = [name for case in HELD["cases"].values() for f in case.values() for name in f]
    assert {bar.figure for bar in BARS} <= set(names)


def test_the_page_of_bars_is_that_of_the_snapshot() -> None:
    assert PAGE.read_text() == page(HELD["cases"], HELD["triton"]), "snapshot.py --page"


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({"issue": 0.2, "useful": 0.99, "spills": 0}, []),  # better
        ({"issue": 0.305, "useful": 0.95, "spills": 0}, []),  # within the tolerance
        ({"issue": 0.35, "useful": 0.95, "spills": 0}, ["conv3 forward: issue 0.35, was 0.3"]),
        (
            {"issue": 0.3, "useful": 0.9, "spills": 0},
            [
                "conv3 forward: useful 0.9, was 0.95",
                "conv3 forward: useful 0.9 misses the bar 0.93",
            ],
        ),
        (
            {"issue": 0.3, "useful": 0.95, "spills": 3},
            ["conv3 forward: spills 3, was 0", "conv3 forward: spills 3 misses the bar 0"],
        ),
    ],
)
def test_what_gets_worse_is_named(figures: dict[str, float], expected: list[str]) -> None:
    held = {"conv3 forward": {"issue": 0.3, "useful": 0.95, "spills": 0.0}}
    assert failures({"conv3 forward": figures}, held, "h100 whole 128") == expected


def test_a_launch_that_is_gone_is_named() -> None:
    held = {"conv3 forward": {"issue": 0.3}}
    assert failures({}, held, "h100 whole 128") == ["conv3 forward: is not launched"]
