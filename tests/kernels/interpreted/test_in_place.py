"""Outputs and inputs changed in place before backward, as by ``nn.ReLU(inplace=True)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import fastalex_kernels as fk

from .._cases import sampled
from .._oracle import Case, call, conv, linear, lrn, make_gradient, make_inputs, pool
from .._oracle import relative_error as error


def _clear_two_channels(y: torch.Tensor) -> torch.Tensor:
    y[:, :2] = 0
    return y


CHANGES: list[Callable[[torch.Tensor], torch.Tensor]] = [
    F.relu_,
    lambda y: y.add_(1),
    lambda y: y.mul_(-2),
    _clear_two_channels,
]
IDS = ["relu", "add", "multiply", "assign"]
NOT_SAVED = [
    conv("without-relu", (2, 4, 5, 4), 6, 3, padding=1, relu=False),
    conv("stride-without-relu", (2, 3, 7, 7), 4, 3, stride=2, relu=False),
    lrn("plain", (2, 8, 5, 5), alpha=1.0),
    lrn("no-pooling", (2, 8, 3, 4), alpha=1.0, kernel_size=1, stride=1),
    pool("plain", (2, 4, 5, 5)),
    pool("copy", (2, 5, 3, 4), kernel_size=1, stride=1),
    linear("without-relu", 3, 7, 9, relu=False),
    linear("bare", 3, 7, 9, relu=False, p=0.0),
]
SAVED = [  # the mask of their ReLU
    conv("plain", (2, 4, 5, 4), 6, 3, padding=1),
    conv("stride", (2, 3, 7, 7), 4, 3, stride=2),
    linear("plain", 3, 7, 9),
    linear("without-dropout", 3, 7, 9, p=0.0),
]


@pytest.mark.parametrize("backend", ["interpreter", "aten"])
@pytest.mark.parametrize("change", CHANGES, ids=IDS)
@pytest.mark.parametrize("case", sampled(NOT_SAVED, 4))
def test_an_output_that_backward_does_not_need(
    case: Case, change: Callable[[torch.Tensor], torch.Tensor], backend: str
) -> None:
    tensors = make_inputs(case, torch.float32)
    with fk.backend(backend):
        y = change(call(case, fk, tensors))
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = change(call(case, fk.reference, wide).clone())
    assert error(y, expected) < 1e-6
    gradient = make_gradient(case, tensors, y)
    found = torch.autograd.grad(y, tensors, gradient)
    wanted = torch.autograd.grad(expected, wide, gradient.double())
    assert max(map(error, found, wanted)) < 1e-6


@pytest.mark.parametrize("change", CHANGES, ids=IDS)
@pytest.mark.parametrize("case", sampled(SAVED, 4))
def test_an_output_that_is_the_mask_of_its_relu(
    case: Case, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    tensors = make_inputs(case, torch.float32)
    y = change(call(case, fk, tensors))
    with torch.no_grad():
        assert torch.equal(y, change(call(case, fk, tensors)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("layout", ["contiguous", "hwnc"])
@pytest.mark.parametrize("case", sampled([*NOT_SAVED, *SAVED], 3))
def test_an_input_changed_after_forward(case: Case, layout: str) -> None:
    """Where the input itself was saved autograd says so; where a copy was, gradients are right."""
    if len(case.shapes[0]) == 4:
        case = replace(case, layout=layout)
    elif layout == "hwnc":
        pytest.skip("rows lie in one way")
    first, *rest = make_inputs(case, torch.float32)
    expected = torch.autograd.grad(call(case, fk, [first, *rest]).sum(), [first, *rest])
    x = first * 1  # no leaf, and it lies as the first does
    y = call(case, fk, [x, *rest])
    x.add_(1)
    try:
        found = torch.autograd.grad(y.sum(), [first, *rest])
    except RuntimeError as raised:
        assert "modified by an inplace operation" in str(raised)  # noqa: PT017
    else:
        assert all(map(torch.equal, found, expected))
