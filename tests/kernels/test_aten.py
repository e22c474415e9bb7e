"""The functions on torch's own operators: what runs on a CPU, and in float64 everywhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import fastalex_kernels as fk

from . import _cases as cases
from ._oracle import Case, call, check, conv, linear, lrn, make_inputs, pool, relative_error
from ._strategies import ANY, SLACK


@pytest.fixture(autouse=True)
def _on_aten():
    with fk.backend("aten"):
        yield


@pytest.mark.parametrize("case", cases.EVERY, ids=str)
def test_float32(case: Case) -> None:
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", cases.BASIC, ids=str)
def test_16_bits(case: Case, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and case.name == "conv-batch128":
        pytest.skip("on a CPU torch sums a float16 weight gradient in float16")
    check(case, dtype)


# Small, away from ties and corners: finite differences see both sides of one.
GRADCHECK = [
    conv("plain", (2, 4, 5, 4), 6, 3, padding=1, groups=2),
    conv("asymmetric", (1, 2, 4, 5), 3, (2, 3), padding=((0, 2), (1, 0)), bias=False),
    conv("conv1", (1, 3, 13, 9), 2, 5, stride=4, padding=((0, 3), (0, 3))),
    lrn("groups", (2, 8, 5, 5), alpha=2.0, groups=2),
    lrn("even", (2, 6, 4, 4), alpha=2.0, size=4, beta=0.5, kernel_size=2, stride=2),
    lrn("small", (2, 5, 3, 3), "channels_last", alpha=1e-4),
    pool("plain", (2, 3, 5, 5)),
    pool("ceil", (2, 3, 6, 4), ceil_mode=True),
    linear("plain", 3, 5, 8, relu=False),
    linear("relu", 3, 5, 8, p=0.3),
]


@pytest.mark.parametrize("case", GRADCHECK, ids=str)
def test_gradients_by_finite_differences(case: Case) -> None:
    tensors = make_inputs(case, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: call(case, fk, list(t)), tensors)


@pytest.mark.parametrize("case", cases.BASIC, ids=str)
def test_float64(case: Case) -> None:
    tensors = make_inputs(case, torch.float64)
    output = call(case, fk, tensors)
    assert output.dtype == torch.float64
    assert relative_error(output, call(case, fk.reference, tensors)) < 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("op", ANY)
@settings(max_examples=150)
@given(data=st.data())
def test_any_call(op: str, data: Any) -> None:
    check(data.draw(ANY[op]), torch.float32, slack=SLACK)


def test_pooling_that_pools_nothing_leaves_the_input_alone() -> None:
    x = torch.randn(2, 3, 4, 4)
    y = fk.max_pool2d(x, kernel_size=1, stride=1)
    before = x.clone()
    y.relu_()
    assert torch.equal(x, before)


def test_the_gradient_of_one_image_may_come_in_another_order() -> None:
    pooled = {"kernel_size": 2, "stride": 1}
    check(lrn("one image", (1, 2, 2, 2), "hwnc", size=1, groups=2, **pooled), torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_dropout_drops_what_is_not_finite(value: float) -> None:
    x, w = torch.full((4, 3), value), torch.ones(50, 3)
    rng = torch.tensor([1, 2])
    expected = fk.reference.linear_relu_dropout(x, w, rng=rng)
    assert (expected == 0).any()
    output = fk.linear_relu_dropout(x, w, rng=rng)
    torch.testing.assert_close(output, expected, equal_nan=True)


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1e-300, 1e-30, 1e5, 1e30])
def test_extreme_constants_of_lrn(alpha: float) -> None:
    check(lrn("extreme", (2, 16, 5, 6), alpha=alpha), torch.float32)


@pytest.mark.parametrize("size", [1, 2, 4, 5, 30])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_lrn_hands_what_is_not_finite_to_its_window_alone(value: float, size: int) -> None:
    x = torch.randn(2, 24, 3, 4)
    x[1, 3, 2, 1] = x[0, 17, 1, 1] = value
    x[0, 0, 0, 0] = x[0, 11, 0, 0] = value
    arguments = {"size": size, "alpha": 1.0, "groups": 2, "kernel_size": 1, "stride": 1}
    results = []
    for module in (fk, fk.reference):
        leaf = x.clone().requires_grad_()
        y = module.lrn_max_pool2d(leaf, **arguments)
        results.append((y.detach(), torch.autograd.grad(y, leaf, torch.ones_like(y))[0]))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_lrn_leaves_nothing_behind_for_the_next_call() -> None:
    x = torch.randn(2, 37, 3, 3)
    with FakeTensorMode() as fakes:
        fk.lrn_max_pool2d(fakes.from_tensor(x), kernel_size=1, stride=1)
    with torch.inference_mode():
        expected = fk.lrn_max_pool2d(x, kernel_size=1, stride=1).clone()
    leaf = x.clone().requires_grad_()
    y = fk.lrn_max_pool2d(leaf, kernel_size=1, stride=1)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert leaf.grad.isfinite().all()


def test_lrn_under_autocast_has_the_bits_of_float32() -> None:
    x = torch.randn(2, 16, 5, 5, requires_grad=True)
    plain = fk.lrn_max_pool2d(x, alpha=1.0)
    expected = torch.autograd.grad(plain.sum(), x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = fk.lrn_max_pool2d(x, alpha=1.0)
        found = torch.autograd.grad(y.sum(), x)[0]
    assert torch.equal(y, plain)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("images", [1, 5])
def test_lrn_has_the_same_bits_on_any_number_of_threads(images: int) -> None:
    """And leaves torch's number of threads alone, in threads that start later, too."""
    before, found = torch.get_num_threads(), []
    x = torch.randn(images, 16, 9, 7)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            y = fk.lrn_max_pool2d(leaf, alpha=1.0, groups=2)
            y.square().sum().backward()
            found.append((y.detach(), leaf.grad))
            with ThreadPoolExecutor(1) as later:
                assert later.submit(torch.get_num_threads).result() == threads
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for y, dx in found[1:]:
        assert torch.equal(y, found[0][0])
        assert torch.equal(dx, found[0][1])
