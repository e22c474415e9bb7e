"""The backward pass of a ReLU done by the kernel that makes its gradient: values and bias sums."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastalex_kernels import reference
from fastalex_kernels.common.layout import as_hwnc
from fastalex_kernels.common.parameters import Norm, Pooling, Window
from fastalex_kernels.common.reduce import fold
from fastalex_kernels.lrn_pool.general import lrn_max_pool2d_backward, lrn_max_pool2d_forward
from fastalex_kernels.reference import relative_error, tolerance

from .. import _masks as masks
from .._cases import sampled
from .._oracle import Case, conv, linear
from .conftest import RealTiles

HALF = torch.float16


def _draw(seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(HALF)


@pytest.mark.parametrize(
    "case",
    [
        conv("groups", (3, 32, 9, 7), 48, 3, padding=1, groups=2),
        conv("whole-tiles", (128, 32, 2, 3), 16, 3, padding=1, groups=2),
        linear("p0.5", 5, 72, 40),
        linear("p0.3", 130, 24, 72, p=0.3),
        linear("split", 3, 104, 1640, p=0.3),
        linear("odd", 17, 23, 19, p=0.0),
    ],
    ids=str,
)
def test_products(case: Case, real_tiles: RealTiles) -> None:
    with real_tiles("sm_90"):
        masks.check(case, HALF)


@pytest.mark.parametrize(
    "below",
    sampled(
        [
            (Norm(5, 0.2, 0.75, 2.0), 3, 32, (9, 7)),  # chunks of 8 channels
            (Norm(5, 0.2, 0.75, 2.0), 37, 32, (3, 5)),  # programs of 32 images, and one of 5
            (Norm(5, 0.2, 0.75, 2.0), 11, 96, (3, 3)),  # of 10 images and a half, and the rest
            (Norm(5, 0.2, 0.75, 2.0), 2, 2048, (3, 3)),  # of less than an image
            (Norm(3, 0.2, 0.75, 2.0), 3, 32, (5, 4)),  # the general kernel
            (None, 5, 32, (5, 4)),
            (None, 128, 32, (3, 3)),
        ],
        3,
    ),
)
def test_normalisation_and_pooling(
    below: tuple[Norm | None, int, int, tuple[int, int]], real_tiles: RealTiles
) -> None:
    norm, images, channels, size = below
    draw, groups = _draw(1), 2
    pooling = Pooling(norm, groups, Window(3, 2))
    z = draw(images, channels, *size)
    x = as_hwnc(z.relu())
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
        made, argmax = lrn_max_pool2d_forward(x, pooling, pooled, save=True)
        given = (x, as_hwnc(dy), argmax, pooling, size)
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


def test_too_many_partials_are_folded() -> None:
    partials = torch.randn(8448, 24)
    folded = fold(partials)
    assert len(folded) < 1000
    assert relative_error(folded.double().sum(0), partials.double().sum(0)) <= 1e-6
