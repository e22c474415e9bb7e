"""Arguments that are legal and unusual: strides, sizes between the tiles, state that moves on."""

from __future__ import annotations

import pytest
import torch

import fastalex_kernels as fk

from .._oracle import relative_error
from .conftest import RealTiles


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("shape", [(2, 3, 192, 3), (3, 40, 192, 1), (2, 20, 96, 2)])
def test_a_tail_of_outputs_and_a_rest_of_channels(
    target: str, shape: tuple[int, int, int, int], real_tiles: RealTiles
) -> None:
    n, c, k, size = shape
    x, w = torch.randn(n, c, 4, 4).half(), torch.randn(k, c, size, size).half()
    # What lies behind the weight must not be read: were it, a product with zero would be NaN.
    memory = torch.full((w.numel() + 100_000,), float("nan"), dtype=torch.float16)
    packed = memory[: w.numel()].view(size, size, c, k)
    packed.copy_(w.permute(2, 3, 1, 0))
    with real_tiles(target):
        y = fk.conv2d_relu(x, packed.permute(3, 2, 0, 1))
    assert relative_error(y, fk.reference.conv2d_relu(x.double(), w.double())) < 1e-3


@pytest.mark.parametrize("bias", [torch.randn(16)[::2], torch.ones(1).expand(8)], ids=["2", "0"])
def test_a_bias_of_any_stride(bias: torch.Tensor) -> None:
    x, w = torch.randn(2, 5, 4, 4), torch.randn(8, 5, 3, 3)
    expected = fk.reference.conv2d_relu(x.double(), w.double(), bias.double())
    assert relative_error(fk.conv2d_relu(x, w, bias), expected) < 1e-6
    a, m = torch.randn(3, 5), torch.randn(8, 5)
    expected = fk.reference.linear_relu_dropout(a.double(), m.double(), bias.double(), p=0.0)
    assert relative_error(fk.linear_relu_dropout(a, m, bias, p=0.0), expected) < 1e-6


@pytest.mark.parametrize("relu", [True, False])
def test_rng_of_any_stride_that_moves_on_before_backward(relu: bool) -> None:
    rng = torch.tensor([[3, 8], [4, 9]])[:, 0]
    x, w = torch.randn(6, 5, requires_grad=True), torch.randn(8, 5)
    y = fk.linear_relu_dropout(x, w, relu=relu, rng=rng)
    wide = x.detach().double().requires_grad_()
    expected = fk.reference.linear_relu_dropout(wide, w.double(), relu=relu, rng=rng.clone())
    rng.add_(1)
    y.sum().backward()
    expected.sum().backward()
    assert relative_error(y, expected) < 1e-6
    assert relative_error(x.grad, wide.grad) < 1e-6


def test_bfloat16_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y = fk.conv2d_relu(torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3))
    assert y.dtype == torch.bfloat16


def test_a_stride_that_leaves_rows_of_the_image_out() -> None:
    x, w = torch.randn(1, 2, 1, 9), torch.randn(4, 2, 5, 3)
    arguments = {"stride": 5, "padding": ((8, 0), (0, 0))}
    expected = fk.reference.conv2d_relu(x.double(), w.double(), **arguments)
    assert fk.conv2d_relu(x, w, **arguments).shape == expected.shape
    torch.testing.assert_close(fk.conv2d_relu(x, w, **arguments), expected.float())


def test_no_outputs() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    fk.linear_relu_dropout(x, torch.randn(0, 5), torch.randn(0), p=0.0).sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 5))


def test_relu_of_a_nan_hands_its_gradient_on() -> None:
    x = torch.full((1, 1, 1, 1), float("nan"), requires_grad=True)
    fk.conv2d_relu(x, torch.ones(1, 1, 1, 1)).sum().backward()
    assert x.grad.item() == 1.0
