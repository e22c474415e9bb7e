"""A ReLU's mask and bias sums made by the layer behind it, and every way in which they are not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import fastalex_kernels as fk
from fastalex_kernels.conv2d_relu import pack_weight
from fastalex_kernels.momentum import MomentumUpdate, Updates
from fastalex_kernels.reference import TOLERANCES

from .._oracle import relative_error
from ._strict import Strict
from .conftest import RealTiles

HALF = torch.float16
APART = "_epilogue_bwd_kernel"  # the pass over an activation and its gradient
Change = Callable[[torch.Tensor], torch.Tensor]


def _updates(weight: torch.Tensor, bias: torch.Tensor) -> Updates:
    rate = torch.tensor([0.25, 0.0, 0.0])  # the velocity is the gradient
    pack = partial(pack_weight, stride=1)
    operand = torch.empty(pack(weight.detach()).shape, dtype=HALF)
    zeros = [torch.zeros_like(p.detach()) for p in (weight, bias)]
    return Updates(
        MomentumUpdate(weight, zeros[0], rate, "torch", operand, pack),
        MomentumUpdate(bias, zeros[1], rate, "torch", torch.empty(bias.shape, dtype=HALF)),
    )


def _convolution(y: torch.Tensor) -> torch.Tensor:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1))
    weight = draw(48, y.shape[1] // 2, 3, 3).mul_(0.1).to(HALF)
    return fk.conv2d_relu(y, weight, padding=1, groups=2)


BEHIND: dict[str, Change] = {
    "chunks": partial(fk.lrn_max_pool2d, alpha=1.0, groups=2),
    "any LRN": partial(fk.lrn_max_pool2d, alpha=1.0, size=3, groups=2),
    "pooling": fk.max_pool2d,
    "convolution": _convolution,
}
KERNELS = {
    "chunks": "_lrn_max_pool2d_chunks_bwd_kernel",
    "any LRN": "_lrn_max_pool2d_bwd_kernel",
    "pooling": "_lrn_max_pool2d_bwd_kernel",
    "convolution": "_conv2d_relu_fwd_kernel",
}


def _gradients(
    change: Change,
    images: int = 3,
    updated: bool = True,
    twice: bool = False,
    behind: str = "chunks",
) -> list[torch.Tensor]:
    """Of weight and bias of a convolution; ``change`` sees what goes to the layer ``behind`` it.

    ``twice`` gives the convolution's output a gradient of its own as well.
    """
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    x = draw(images, 16, 9, 7).to(HALF)
    w, b = (draw(*s).mul_(0.1).requires_grad_() for s in ((32, 16, 3, 3), (32,)))
    update = _updates(w, b)
    narrow: Any = (w, b) if updated else (w.to(HALF), b.to(HALF))
    y = fk.conv2d_relu(x, *narrow, padding=1, update=update if updated else None)
    z = BEHIND[behind](change(y))
    outputs, gradients = [z], [draw(*z.shape).to(HALF)]
    if twice:
        outputs.append(y)
        gradients.append(draw(*y.shape).to(HALF))
    torch.autograd.backward(outputs, gradients)
    if updated:
        return [u.velocity for u in update if u is not None]
    return [p.grad for p in (w, b) if p.grad is not None]


def _hooked(hook: Callable[[torch.Tensor], torch.Tensor | None]) -> Change:
    def change(y: torch.Tensor) -> torch.Tensor:
        y.register_hook(hook)
        return y

    return change


def _same(y: torch.Tensor) -> torch.Tensor:
    return y


def _doubled_in_place(gradient: torch.Tensor) -> None:
    gradient.mul_(2)


def _compare(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert relative_error(one, other) <= TOLERANCES[HALF]
    assert float(expected[1].norm()) > 1


@pytest.mark.parametrize(
    ("behind", "images"),
    [
        ("chunks", 3),
        ("chunks", 37),  # of 4 chunks: whole programs of 32 images, and one of 5
        ("any LRN", 3),
        ("pooling", 5),
        ("convolution", 3),
        ("convolution", 128),
    ],
)
def test_the_layer_behind_masks_and_sums(
    real_tiles: RealTiles, strict: Strict, behind: str, images: int
) -> None:
    with real_tiles("sm_90"):
        expected = _gradients(_same, images, updated=False, behind=behind)
        assert APART in strict.launches
        apart = strict.launches.count(APART)
        strict.launches.clear()
        ours = _gradients(_same, images, behind=behind)
    # The convolution behind undoes its own ReLU.
    assert strict.launches.count(APART) == apart - 1
    assert KERNELS[behind] in [name.replace("_tma", "") for name in strict.launches]
    assert "_sum_partials_kernel" not in strict.launches
    assert strict.launches.count("_sum_update_kernel") == 1, "for weight and bias"
    _compare(ours, expected)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda y: y * 1.0, id="another function between"),
        pytest.param(_hooked(lambda g: g * 2), id="a hook with a new gradient"),
        pytest.param(_hooked(_doubled_in_place), id="a hook that changes it in place"),
    ],
)
def test_a_gradient_that_changed_is_masked_and_summed_anew(
    real_tiles: RealTiles, strict: Strict, change: Change
) -> None:
    with real_tiles("sm_90"):
        ours = _gradients(change)
        assert APART in strict.launches
        _compare(ours, _gradients(change, updated=False))


def test_a_sum_of_two_gradients_is_masked_and_summed_anew(
    real_tiles: RealTiles, strict: Strict
) -> None:
    with real_tiles("sm_90"):
        ours = _gradients(_same, twice=True)
        assert APART in strict.launches
        _compare(ours, _gradients(_same, updated=False, twice=True))
