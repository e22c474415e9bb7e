"""One of two towers: channels in two tensors, gradients as two shares."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastalex_kernels import reference
from fastalex_kernels.common.layout import as_hwnc, as_nchw
from fastalex_kernels.common.parameters import Norm, Pooling, Window
from fastalex_kernels.conv2d.arguments import spell_out
from fastalex_kernels.conv2d.forward import (
    conv2d_relu_backward_input,
    conv2d_relu_forward,
    pack_weight,
)
from fastalex_kernels.conv2d.weight import conv2d_relu_backward_weight
from fastalex_kernels.lrn_pool.general import lrn_max_pool2d_backward, lrn_max_pool2d_forward
from fastalex_kernels.reference import relative_error, tolerance

from .._cases import sampled
from .._oracle import Case, conv, make_inputs
from ._strict import Strict
from .conftest import RealTiles

CASES = [
    conv("pixels", (128, 64, 3, 5), 48, 3, padding=1),
    conv("inside", (128, 32, 3, 4), 192, (2, 3)),
    conv("taps-of-a-line", (128, 96, 3, 5), 32, 5, padding=2),
    conv("odd", (9, 70, 5, 4), 130, 3, padding=((0, 1), (2, 0))),
    conv("tails", (64, 96, 3, 3), 24, 3, padding=1, relu=False),
    conv("one-tap", (3, 34, 2, 2), 16, 1),
]


def _halves(x: torch.Tensor) -> torch.Tensor:
    """[2, H, W, N, C / 2] of x [N, C, H, W]."""
    return torch.stack(as_hwnc(x).chunk(2, -1))


@pytest.mark.parametrize(
    "on", sampled(itertools.product(CASES, ["sm_90", "sm_80", "sm_120"]), 18, first=8)
)
def test_convolution(on: tuple[Case, str], real_tiles: RealTiles, strict: Strict) -> None:
    case, target = on
    for dtype in (torch.float16, torch.float32):
        x, w, b = (t.detach() for t in make_inputs(case, dtype))
        sides, _ = spell_out(case.arguments.get("padding", 0), 1)
        relu = case.arguments.get("relu", True)
        leaves = [t.double().requires_grad_() for t in (x.relu(), w, b)]
        expected = reference.conv2d_relu(*leaves, padding=sides, relu=relu)
        generator = torch.Generator().manual_seed(4)
        # The gradient of what is before the ReLU.
        dz = torch.randn(expected.shape, generator=generator).to(dtype)
        plain = reference.conv2d_relu(*leaves, padding=sides, relu=False)
        dx, dw, _ = torch.autograd.grad(plain, leaves, dz.double())
        masked = torch.where(x > 0, dx, 0.0)
        size, packed, given = (x.shape[2], x.shape[3]), pack_weight(w), _halves(x.relu())
        with real_tiles(target):
            y = conv2d_relu_forward(given, packed, b, sides, 1, relu)
            inputs = [
                conv2d_relu_backward_input(as_hwnc(dz), packed, size, sides, 1, mask, halves=2)
                for mask in (None, given)
            ]
            partials = conv2d_relu_backward_weight(given, as_hwnc(dz), w.shape[2:], sides, 1)
        bound = tolerance(dtype, w[0].numel())
        assert relative_error(y, expected) <= bound
        for (made, sums), wanted in zip(inputs, (dx, masked), strict=True):
            assert made.is_contiguous()
            assert relative_error(made, _halves(wanted)) <= tolerance(dtype, w[:, 0].numel())
            if sums is not None:
                assert relative_error(sums.double().sum(0), masked.sum((0, 2, 3))) <= 8e-3
        rows = expected.numel() // expected.shape[1]
        found = partials.sum(0, dtype=torch.float64).permute(3, 2, 0, 1)
        assert relative_error(found, dw) <= tolerance(torch.float32, rows)
    assert strict.launches


@pytest.mark.parametrize(
    "norm", [Norm(5, 0.2, 0.75, 2.0), Norm(3, 0.2, 0.75, 2.0), None], ids=["chunks", "any", "none"]
)
@pytest.mark.parametrize("images", [3, 37])
def test_shares_of_a_gradient(norm: Norm | None, images: int, real_tiles: RealTiles) -> None:
    """They do what their sum does, whatever each of them holds."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(images, 32, 7, 5, generator=generator).half().relu()
    pooling = Pooling(norm, 1, Window(3, 2))
    with real_tiles("sm_90"):
        y, argmax = lrn_max_pool2d_forward(as_hwnc(x), pooling, (3, 2), save=True)
        # Of small integers the sum is exact.
        shares = [torch.randint(-8, 9, argmax.shape, generator=generator).half() for _ in range(2)]
        options = {"mask": True, "y": None if norm else as_hwnc(y)}
        rest = argmax, pooling, (7, 5)
        found = lrn_max_pool2d_backward(as_hwnc(x), shares[0], *rest, share=shares[1], **options)
        expected = lrn_max_pool2d_backward(as_hwnc(x), sum(shares), *rest, **options)
    assert found[1] is not None
    assert expected[1] is not None
    assert as_nchw(as_hwnc(found[0])).count_nonzero() > 0
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
