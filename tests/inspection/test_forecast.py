"""The estimate of a launch, against counts by hand and against published times."""

from __future__ import annotations

import pytest

from fastalex.inspection import forecast
from fastalex.inspection.forecast import ASSUMED, L2, Rates, Turn
from fastalex.inspection.gpus import GPUS
from tests.inspection import published

H100 = GPUS["h100"]
RATES = Rates(
    1e9, 1e12, 1e12, 100.0, gap=1e-6, hidden=4e-7, ramp=2e-6, program=0, latency=100,
    memory_latency=400,
)  # fmt: skip


@pytest.mark.parametrize("kernel", published.KERNELS, ids=lambda k: f"{k.name} {k.source[-12:]}")
def test_published_times_are_near(kernel: published.Matmul | published.Sum) -> None:
    made = published.estimates(kernel)
    assert made.low < made.middle < made.high
    assert made.middle == pytest.approx(kernel.published, rel=0.2)


@pytest.mark.parametrize(
    ("turn", "limit", "cycles"),
    [
        (Turn(1000, 128 * 900, 800, 0), "tensor", 1000),
        (Turn(1000, 128 * 1500, 800, 0), "shared", 1500),
        (Turn(1000, 128 * 900, 1200, 0), "issue", 1200),
        (Turn(10, 128 * 20, 5, 0), "latency", 100),  # one load cannot be faster
        (Turn(1000, 0, 0, 0, drained=True), "latency", 1150),
        (Turn(10, 0, 0, 0, from_memory=1.0), "latency", 500),  # waits for what it loads itself
        (Turn(10, 0, 0, 0, from_memory=0.5, ahead=1), "latency", 200),
        (Turn(10, 0, 0, 0, from_memory=1.0, ahead=8), "latency", 100),
    ],
)
def test_a_turn_takes_the_longest_of_what_it_asks(turn: Turn, limit: str, cycles: float) -> None:
    """A program of 10 turns on each processor."""
    terms = forecast.product(H100, RATES, turn, [10] * H100.processors, 1, 0.0)
    assert terms[limit] == pytest.approx(10 * cycles / RATES.clock)


def test_a_second_program_fills_the_wait_of_a_drained_turn() -> None:
    turn = Turn(1000, 0, 0, 0, drained=True)
    both = forecast.product(H100, RATES, turn, [10] * 2 * H100.processors, 2, 0.0)
    assert both["tensor"] == pytest.approx(2 * 10 * 1000 / RATES.clock)


def test_places_that_no_program_takes_give_no_time() -> None:
    turn, programs = Turn(10, 0, 0, 0), [10] * H100.processors
    alone, many = (forecast.product(H100, RATES, turn, programs, n, 0.0) for n in (1, 4))
    assert many["latency"] == pytest.approx(alone["latency"])


def test_bytes_of_every_turn_pass_l2() -> None:
    terms = forecast.product(H100, RATES, Turn(1, 0, 0, 1000), [3, 5], 1, 4000.0)
    assert terms["L2"] == pytest.approx(8000 / RATES.l2)
    assert terms["memory"] == pytest.approx(4000 / RATES.memory)
    made = forecast.estimate([RATES] * 3, [terms] * 3)
    assert made.middle == pytest.approx(max(terms.values()) + RATES.gap)
    early = forecast.estimate([RATES] * 3, [terms] * 3, starts_early=True)
    assert made.middle - early.middle == pytest.approx(RATES.hidden)


def test_l2_holds_what_was_touched_last() -> None:
    cache = L2(100.0)
    assert not cache.touch("a", 60)
    assert not cache.touch("b", 30)
    assert cache.touch("a", 60)
    assert not cache.touch("c", 30)  # b goes
    assert not cache.touch("b", 30)
    assert not cache.touch("big", 1000)  # holds nothing, and leaves nothing
    assert not cache.touch("a", 60)


@pytest.mark.parametrize("name", ASSUMED)
def test_rates_are_ordered_and_below_the_maker_s(name: str) -> None:
    (gpu,) = [gpu for gpu in GPUS.values() if gpu.name == name]
    low, middle, high = ASSUMED[name]
    for better, worse in ((low, middle), (middle, high)):
        assert all(a >= b for a, b in zip(better[:5], worse[:5], strict=True))
        assert all(a <= b for a, b in zip(better[5:], worse[5:], strict=True))
    assert low.clock <= 1.001 * gpu.clock
    assert low.memory < 1e12 * gpu.peak_bandwidth
