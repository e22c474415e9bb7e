"""``cross_entropy`` in the interpreter, under strict rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastalex_kernels as fk
from fastalex_kernels.momentum import MomentumUpdate, Updates
from fastalex_kernels.reference import TOLERANCES, relative_error

from .. import _losses as losses
from .._losses import Case, check, make, run
from ._strict import Strict
from .conftest import RealTiles

LOSS, SUM, APART = "_cross_entropy_kernel", "_sum_partials_kernel", "_epilogue_bwd_kernel"
INF = float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", losses.CASES, ids=str)
def test_against_float64(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", losses.CASES, ids=str)
def test_on_real_tiles(case: Case, dtype: torch.dtype, real_tiles: RealTiles) -> None:
    with real_tiles("sm_90"):
        check(case, dtype)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_call(data: Any, real_tiles: RealTiles) -> None:
    shape = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 2100)))
    spread, shift = data.draw(st.tuples(st.floats(0, 8), st.floats(-50, 50)))
    seed = data.draw(st.integers(0, 2**16))
    with real_tiles("sm_90"):
        check(Case("any", shape, spread, shift, "contiguous", seed), torch.float32)


def test_a_gradient_that_was_announced_is_made_with_the_loss(strict: Strict) -> None:
    logits, target = make(losses.CASES[0], torch.float32)
    early = run(logits, target, announced=True)
    assert strict.launches == [LOSS, SUM]
    strict.launches.clear()
    late = run(logits, target, announced=False)
    assert strict.launches == [LOSS, SUM, LOSS]
    assert torch.equal(early[0], late[0])
    assert torch.equal(early[1], late[1])
    strict.launches.clear()
    with torch.no_grad():
        fk.cross_entropy(logits, target, torch.ones(()))
    fk.cross_entropy(logits.detach(), target, torch.ones(()))
    assert strict.launches == [LOSS, SUM] * 2


def _gradient(logits: torch.Tensor, target: torch.Tensor, g: float) -> torch.Tensor:
    """torch's."""
    loss = F.cross_entropy(logits, target)
    return torch.autograd.grad(loss, logits, torch.tensor(g))[0]


@pytest.mark.parametrize("how", ["another", "changed", "twice"])
def test_whatever_backward_is_called_with_is_right(how: str) -> None:
    logits, target = make(losses.CASES[2], torch.float32)
    announced = torch.tensor(4.0)
    loss = fk.cross_entropy(logits, target, announced)
    given = torch.tensor(-2.0) if how == "another" else announced
    if how == "changed":
        announced.mul_(2)
    for _ in range(2 if how == "twice" else 1):
        (found,) = torch.autograd.grad(loss, logits, given, retain_graph=True)
        expected = _gradient(logits, target, float(given))
        assert relative_error(found, expected) <= TOLERANCES[torch.float32]
        found.zero_()  # whoever is given a gradient may change it


def test_a_small_gradient_is_scaled_before_it_is_rounded() -> None:
    """What a loss scale is for: apart, float16 would lose it."""
    logits = torch.zeros(1000, 1000, dtype=torch.float16, requires_grad=True)
    target = torch.zeros(1000, dtype=torch.int64)
    for announced in (False, True):
        _, found = run(logits, target, announced, g=65536.0)
        assert relative_error(found[:, 1:], torch.full((1000, 999), 0.065536)) <= 1e-3
        _, found = run(logits, target, announced, g=1.0)
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
        for announced in (False, True):
            loss, found = run(logits.clone().requires_grad_(), target, announced)
            torch.testing.assert_close(loss, expected.detach(), equal_nan=True)
            torch.testing.assert_close(found, gradient, equal_nan=True)


def test_a_whole_block_that_is_minus_inf(real_tiles: RealTiles) -> None:
    logits = torch.randn(3, 1500)
    logits[1, :1024] = -INF
    target = torch.tensor([0, 1400, 1])
    expected = F.cross_entropy(logits, target)
    with real_tiles("sm_90"):
        loss, found = run(logits.clone().requires_grad_(), target, announced=True)
    assert relative_error(loss, expected) <= TOLERANCES[torch.float32]
    wide = logits.requires_grad_()
    assert relative_error(found, _gradient(wide, target, losses.G)) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("label", [-1, 5, -100, 2**40, -(2**62)])
def test_a_label_that_is_no_class_is_nan(label: int) -> None:
    logits, target = torch.randn(4, 5), torch.tensor([0, 4, label, 1])
    for announced in (False, True):
        loss, found = run(logits.clone().requires_grad_(), target, announced)
        assert loss.isnan()
        assert found.isnan().all(dim=1).tolist() == [False, False, True, False]


def test_an_empty_batch() -> None:
    logits, target = torch.zeros(0, 5, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    loss, found = run(logits, target, announced=True)
    assert loss.isnan()
    assert found.shape == (0, 5)


def _last_layer(
    images: int,
    classes: int,
    dtype: torch.dtype,
    updated: bool,
) -> list[torch.Tensor]:
    """Gradients of weight, bias and input of the layer before the loss, in that order."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 24, generator=generator).to(dtype).requires_grad_()
    w, b = (torch.randn(*s, generator=generator) / 4 for s in ((classes, 24), (classes,)))
    target = torch.randint(0, classes, (images,), generator=generator)
    leaves = [p.requires_grad_() for p in (w, b)]
    update, operands = None, [p.to(dtype) for p in leaves]
    if updated:
        rate = torch.tensor([0.25, 0.0, 0.0])  # the velocity is the gradient
        update = Updates(*(
            MomentumUpdate(p, torch.zeros_like(p), rate, "torch", o.detach())
            for p, o in zip(leaves, operands, strict=True)
        ))  # fmt: skip
        operands = leaves
    logits = fk.linear_relu_dropout(x, *operands, p=0.0, relu=False, update=update)
    g = torch.tensor(8.0)
    fk.cross_entropy(logits, target, g).backward(g)
    if update is not None:
        return [update.weight.velocity, update.bias.velocity, x.grad]  # type: ignore[union-attr, list-item]
    return [p.grad for p in (*leaves, x)]  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(5, 7), (128, 40), (30, 1000), (9, 1100)], ids=str)
def test_the_layer_before_is_updated_with_no_pass_between(
    shape: tuple[int, int], dtype: torch.dtype, real_tiles: RealTiles, strict: Strict
) -> None:
    with real_tiles("sm_90"):
        expected = _last_layer(*shape, dtype, False)
        assert APART in strict.launches
        strict.launches.clear()
        ours = _last_layer(*shape, dtype, True)
    assert APART not in strict.launches
    for one, other in zip(ours, expected, strict=True):
        assert relative_error(one, other) <= TOLERANCES[dtype]
        assert float(other.norm()) > 0.01
