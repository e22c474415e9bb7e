"""One of two towers: channels in two tensors, gradients as two shares."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastalex_kernels.common.layout import as_hwnc
from fastalex_kernels.common.parameters import Norm, Pooling, Window
from fastalex_kernels.lrn_pool.general import lrn_max_pool2d_backward, lrn_max_pool2d_forward

from .. import _halves as halves
from .._cases import sampled
from .._oracle import Case, conv
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


@pytest.mark.parametrize(
    "on", sampled(itertools.product(CASES, ["sm_90", "sm_80", "sm_120"]), 18, first=8)
)
def test_convolution(on: tuple[Case, str], real_tiles: RealTiles, strict: Strict) -> None:
    case, target = on
    for dtype in (torch.float16, torch.float32):
        with real_tiles(target):
            halves.check(case, dtype)
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
    assert found[0].count_nonzero() > 0
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
