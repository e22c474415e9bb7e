"""The backward pass of a ReLU done by the kernel that makes its gradient: values and bias sums."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastalex_kernels import reference
from fastalex_kernels.common.layout import as_hwnc
from fastalex_kernels.common.parameters import Norm, Window
from fastalex_kernels.common.reduce import fold
from fastalex_kernels.conv2d.forward import conv2d_relu_backward_input, pack_weight
from fastalex_kernels.linear.forward import HalvedProduct, matmul
from fastalex_kernels.lrn_pool.general import lrn_max_pool2d_backward, lrn_max_pool2d_forward
from fastalex_kernels.reference import relative_error, tolerance

from .conftest import RealTiles

HALF = torch.float16
Made = tuple[torch.Tensor, torch.Tensor | None]


def _draw(seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(HALF)


def _check(found: Made, z: torch.Tensor, wanted: torch.Tensor) -> None:
    """``wanted`` is the gradient of relu(z) in float64, [N, C, ...]."""
    dz = torch.where(z > 0, wanted, 0.0)
    dx, partials = found
    assert relative_error(dx, dz) <= tolerance(HALF, 0)
    assert torch.equal(dx == 0, dz.to(HALF) == 0)
    if partials is not None:
        assert partials.dtype == torch.float32
        sums = partials.double().sum(0)
        assert relative_error(sums, dx.double().sum((0, 2, 3))) <= 1e-3


@pytest.mark.parametrize(
    ("images", "channels", "outputs", "size"), [(3, 32, 48, (9, 7)), (128, 32, 16, (2, 3))]
)
def test_convolution(
    real_tiles: RealTiles, images: int, channels: int, outputs: int, size: tuple[int, int]
) -> None:
    draw = _draw(0)
    z, w = draw(images, channels, *size), draw(outputs, channels // 2, 3, 3) / 12
    dy = draw(images, outputs, *size)
    y = z.double().relu().requires_grad_()
    reference.conv2d_relu(y, w.double(), padding=1, groups=2, relu=False).backward(dy.double())
    with real_tiles("sm_90"):
        found = conv2d_relu_backward_input(
            as_hwnc(dy), pack_weight(w), size, ((1, 1), (1, 1)), 2, mask=as_hwnc(z.relu())
        )
    assert found[1] is not None
    assert y.grad is not None
    _check(found, z, y.grad)


@pytest.mark.parametrize(
    ("norm", "images", "channels", "size"),
    [
        (Norm(5, 0.2, 0.75, 2.0), 3, 32, (9, 7)),  # chunks of 8 channels
        (Norm(5, 0.2, 0.75, 2.0), 37, 32, (3, 5)),  # programs of 32 images, and one of 5
        (Norm(5, 0.2, 0.75, 2.0), 11, 96, (3, 3)),  # of 10 images and a half, and one of the rest
        (Norm(5, 0.2, 0.75, 2.0), 2, 2048, (3, 3)),  # of less than an image
        (Norm(3, 0.2, 0.75, 2.0), 3, 32, (5, 4)),  # the general kernel
        (None, 5, 32, (5, 4)),
        (None, 128, 32, (3, 3)),
    ],
    ids=str,
)
def test_normalisation_and_pooling(
    real_tiles: RealTiles, norm: Norm | None, images: int, channels: int, size: tuple[int, int]
) -> None:
    draw, window = _draw(1), Window(3, 2)
    z = draw(images, channels, *size)
    x, groups = as_hwnc(z.relu()), 2
    pooled = ((size[0] - 1) // 2, (size[1] - 1) // 2)
    y = z.double().relu().requires_grad_()
    if norm is None:
        output = reference.max_pool2d(y)
    else:
        constants = (norm.size, norm.scale * norm.size, norm.beta, norm.offset, groups)
        output = reference.lrn_max_pool2d(y, *constants)
    dy = draw(*output.shape)
    output.backward(dy.double())
    with real_tiles("sm_90"):
        made, argmax = lrn_max_pool2d_forward(x, norm, groups, window, pooled, save=True)
        given = (x, as_hwnc(dy), argmax, norm, groups, window, size)
        pooled_map = None if norm else as_hwnc(made)
        found = lrn_max_pool2d_backward(*given, mask=True, y=pooled_map)
        apart, _ = lrn_max_pool2d_backward(*given)
    assert found[1] is not None
    # Which of two values within rounding is the maximum, either may say: compare where we agree.
    assert y.grad is not None
    agreed = (apart != 0) == (y.grad.to(HALF) != 0)
    assert float(agreed.double().mean()) > 0.97
    dx = torch.where(agreed, found[0], 0.0)
    wanted = torch.where(agreed, y.grad, 0.0)
    assert relative_error(dx, torch.where(z > 0, wanted, 0.0)) <= tolerance(HALF, 0)
    masked = torch.where(z > 0, apart, 0.0)
    assert relative_error(found[0], masked) <= tolerance(HALF, 0)
    sums = found[1].double().sum(0)
    assert relative_error(sums, found[0].double().sum((0, 2, 3))) <= 1e-3


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "p"),
    [(5, 40, 72, 0.5), (130, 72, 24, 0.3), (3, 104, 1640, 0.3), (17, 23, 19, 0.0)],
)
def test_fully_connected(
    real_tiles: RealTiles, rows: int, inputs: int, outputs: int, p: float
) -> None:
    draw = _draw(2)
    z, w, dz = draw(rows, inputs), draw(outputs, inputs) / 16, draw(rows, outputs)
    wanted = torch.where(z > 0, dz.double() @ w.double() / (1 - p), 0.0)
    with real_tiles("sm_90"):
        dx = matmul(dz, w, p=p, mask=z.relu())
    assert relative_error(dx, wanted) <= tolerance(HALF, outputs)
    assert torch.equal(dx == 0, wanted.to(HALF) == 0)


@pytest.mark.parametrize("first", [0, 1])
def test_halves_of_a_product_are_added_alike(real_tiles: RealTiles, first: int) -> None:
    """Whichever half comes first, the partials are in the order of the columns: equal bits."""
    draw = _draw(3)
    x, w, bias = draw(20, 2080), draw(40, 2080) / 45, draw(40)
    results = []
    with real_tiles("sm_90"):
        for half in (first, 1 - first):
            halves = x.chunk(2, 1)
            assert HalvedProduct.gains(halves[half], w)
            product = HalvedProduct(halves[half], w)
            for turn in (half, 1 - half):
                product.add(halves[turn], turn)
            results.append(product.finish(bias=bias, relu=True))
    wanted = torch.relu(x.double() @ w.double().t() + bias.double())
    assert relative_error(results[0], wanted) <= tolerance(HALF, 2080)
    assert torch.equal(*results)


def test_too_many_partials_are_folded() -> None:
    partials = torch.randn(8448, 24)
    folded = fold(partials)
    assert len(folded) < 1000
    assert relative_error(folded.double().sum(0), partials.double().sum(0)) <= 1e-6
