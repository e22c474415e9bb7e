"""``cross_entropy`` in the interpreter, under strict rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastalex_kernels.common.reduce import sum_partials
from fastalex_kernels.cross_entropy import cross_entropy_forward
from fastalex_kernels.reference import TOLERANCES, relative_error

from .. import _losses as losses
from .._cases import sampled
from .._losses import Case, check, make, run
from .conftest import RealTiles

INF = float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", sampled(losses.CASES, 4))
def test_against_float64(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", sampled(losses.CASES, 6))
def test_on_real_tiles(case: Case, dtype: torch.dtype, real_tiles: RealTiles) -> None:
    with real_tiles("sm_90"):
        check(case, dtype)


@pytest.mark.slow
@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_call(data: Any, real_tiles: RealTiles) -> None:
    shape = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 2100)))
    spread, shift = data.draw(st.tuples(st.floats(0, 8), st.floats(-50, 50)))
    seed = data.draw(st.integers(0, 2**16))
    with real_tiles("sm_90"):
        check(Case("any", shape, spread, shift, "contiguous", seed), torch.float32)


def test_loss_and_gradient_in_one_launch_have_the_bits_of_two() -> None:
    logits, target = make(losses.CASES[0], torch.float32)
    parts, gradient = cross_entropy_forward(logits.detach(), target, torch.tensor(losses.G))
    together = sum_partials(parts, parts.new_empty(())), gradient
    apart = run(logits, target)
    assert all(map(torch.equal, together, apart))


def _gradient(logits: torch.Tensor, target: torch.Tensor, g: float) -> torch.Tensor:
    """torch's."""
    loss = F.cross_entropy(logits, target)
    return torch.autograd.grad(loss, logits, torch.tensor(g))[0]


def test_a_small_gradient_is_scaled_before_it_is_rounded() -> None:
    """What a loss scale is for: apart, float16 would lose it."""
    logits = torch.zeros(1000, 1000, dtype=torch.float16, requires_grad=True)
    target = torch.zeros(1000, dtype=torch.int64)
    _, found = run(logits, target, g=65536.0)
    assert relative_error(found[:, 1:], torch.full((1000, 999), 0.065536)) <= 1e-3
    _, found = run(logits, target, g=1.0)
    assert relative_error(found[:, 1:], torch.full((1000, 999), 1e-6)) > 1e-3


SPECIAL = {
    "inf": [INF, 0.0, 1.0],
    "minus inf": [-INF, 0.0, 1.0],
    "minus inf, the label": [0.0, -INF, 1.0],
    "nothing else": [-INF, -INF, -INF],
    "nan": [float("nan"), 0.0, 1.0],
    "the largest": [3e38, 3e38, -3e38],
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("columns", [3, 2600])
@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_not_finite_is_as_in_torch(name: str, columns: int, real_tiles: RealTiles) -> None:
    """The other rows keep their gradients."""
    logits = torch.randn(4, columns)
    logits[2] = -INF if name == "nothing else" else 0.5
    logits[2, torch.tensor([0, 1, columns - 1])] = torch.tensor(SPECIAL[name])
    target = torch.tensor([0, 2, 1, 1])
    theirs = logits.clone().requires_grad_()
    expected = F.cross_entropy(theirs, target)
    (gradient,) = torch.autograd.grad(expected, theirs, torch.tensor(losses.G))
    with real_tiles("sm_90"):
        loss, found = run(logits.clone().requires_grad_(), target)
        torch.testing.assert_close(loss, expected.detach(), equal_nan=True)
        torch.testing.assert_close(found, gradient, equal_nan=True)


def test_a_whole_block_that_is_minus_inf(real_tiles: RealTiles) -> None:
    logits = torch.randn(3, 1500)
    logits[1, :1024] = -INF
    target = torch.tensor([0, 1400, 1])
    expected = F.cross_entropy(logits, target)
    with real_tiles("sm_90"):
        loss, found = run(logits.clone().requires_grad_(), target)
    assert relative_error(loss, expected) <= TOLERANCES[torch.float32]
    wide = logits.requires_grad_()
    assert relative_error(found, _gradient(wide, target, losses.G)) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("label", [-1, 5, -100, 2**40, -(2**62)])
def test_a_label_that_is_no_class_is_nan(label: int) -> None:
    logits, target = torch.randn(4, 5), torch.tensor([0, 4, label, 1])
    loss, found = run(logits.clone().requires_grad_(), target)
    assert loss.isnan()
    assert found.isnan().all(dim=1).tolist() == [False, False, True, False]


def test_an_empty_batch() -> None:
    logits, target = torch.zeros(0, 5, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    loss, found = run(logits, target)
    assert loss.isnan()
    assert found.shape == (0, 5)
