"""A ReLU's mask and bias sums made by the layer behind it, and every way in which they are not."""

from __future__ import annotations

import pytest
import torch

import fastalex_kernels as fk
from fastalex_kernels import reference
from fastalex_kernels._handover import hand_over, masked, taken
from fastalex_kernels._lrn_chunks import Norm, Window
from fastalex_kernels.lrn_max_pool2d import lrn_max_pool2d_backward, lrn_max_pool2d_forward
from fastalex_kernels.momentum import MomentumUpdate, Updates

from .._handover import CONVOLUTIONS, LINEARS, Change, Pair, compare, gradients, make_updates
from ._strict import Strict
from .conftest import RealTiles

HALF = torch.float16
APART = "_epilogue_bwd_kernel"  # the pass over an activation and its gradient
KERNELS = {
    "chunks": "_lrn_max_pool2d_chunks_bwd_kernel",
    "any LRN": "_lrn_max_pool2d_bwd_kernel",
    "pooling": "_lrn_max_pool2d_bwd_kernel",
    "convolution": "_conv2d_relu_fwd_kernel",
}


@pytest.mark.parametrize("pair", CONVOLUTIONS, ids=str)
def test_the_layer_behind_masks_and_sums(real_tiles: RealTiles, strict: Strict, pair: Pair) -> None:
    with real_tiles("sm_90"):
        expected = gradients(pair, HALF, updated=False)
        apart = strict.launches.count(APART)
        strict.launches.clear()
        ours = gradients(pair, HALF)
    # The convolution behind undoes its own ReLU.
    assert strict.launches.count(APART) == apart - 1
    assert KERNELS[pair.behind] in [name.replace("_tma", "") for name in strict.launches]
    assert "_sum_partials_kernel" not in strict.launches
    assert strict.launches.count("_sum_update_kernel") == 1, "for weight and bias"
    compare(ours, expected, HALF)


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("pair", LINEARS, ids=str)
def test_the_linear_layer_behind_masks(
    real_tiles: RealTiles, strict: Strict, pair: Pair, dtype: torch.dtype
) -> None:
    with real_tiles("sm_90"):
        ours = gradients(pair, dtype)
    split = pair.outputs > 1000
    assert ("_finish_partials_kernel" in strict.launches) == split
    for apart in (APART, "_sum_update_kernel", "_sum_partials_kernel"):
        assert apart not in strict.launches
    compare(ours, gradients(pair, dtype, updated=False, module=reference), dtype)


def _hooked(hook: Change) -> Change:
    def change(y: torch.Tensor) -> torch.Tensor:
        y.register_hook(hook)
        return y

    return change


def _doubled_in_place(gradient: torch.Tensor) -> None:
    gradient.mul_(2)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda y: y * 1.0, id="another function between"),
        pytest.param(_hooked(lambda g: g * 2), id="a hook with a new gradient"),
        pytest.param(_hooked(_doubled_in_place), id="a hook that changes it in place"),
    ],
)
@pytest.mark.parametrize("pair", [CONVOLUTIONS[4], LINEARS[0]], ids=str)
def test_a_gradient_that_changed_is_masked_and_summed_anew(
    real_tiles: RealTiles, strict: Strict, pair: Pair, change: Change
) -> None:
    with real_tiles("sm_90"):
        ours = gradients(pair, HALF, change=change)
        assert APART in strict.launches
        compare(ours, gradients(pair, HALF, change=change, updated=False), HALF)


@pytest.mark.parametrize("pair", [CONVOLUTIONS[4], LINEARS[0]], ids=str)
def test_a_sum_of_two_gradients_is_masked_and_summed_anew(
    real_tiles: RealTiles, strict: Strict, pair: Pair
) -> None:
    with real_tiles("sm_90"):
        ours = gradients(pair, HALF, twice=True)
        assert APART in strict.launches
        compare(ours, gradients(pair, HALF, updated=False, twice=True), HALF)


@pytest.mark.parametrize("pair", [CONVOLUTIONS[4], LINEARS[0]], ids=str)
def test_the_bias_of_a_frozen_weight_is_updated(strict: Strict, pair: Pair) -> None:
    _, *ours = gradients(pair, HALF, frozen=True)
    assert strict.launches.count("_sum_update_kernel") == 1
    compare(ours, gradients(pair, HALF, updated=False, frozen=True), HALF)


def test_dropout_without_a_relu_keeps_its_mask(strict: Strict) -> None:
    """A zero of such an output may be kept: what lies behind cannot tell."""
    x, w, b = (torch.randn(*s).requires_grad_() for s in ((4, 16), (24, 16), (24,)))
    update = make_updates(w, b, HALF)
    y = fk.linear_relu_dropout(x.half(), w, b, p=0.5, relu=False, update=update)
    fk.linear_relu_dropout(y, torch.randn(8, 24).half(), p=0.0, relu=False).sum().backward()
    assert strict.launches.count(APART) == 1


def test_too_many_sums_are_folded(strict: Strict) -> None:
    sums = torch.randn(8448, 24)
    gradient = hand_over(torch.zeros(2, 24), sums)
    assert "_sum_partials_kernel" in strict.launches
    folded = taken(gradient)
    assert folded is not None
    assert len(folded) < 1000
    expected = sums.double().sum(0)
    assert reference.relative_error(folded.double().sum(0), expected) <= 1e-6


def test_a_program_that_holds_less_than_an_image_leaves_no_sums(real_tiles: RealTiles) -> None:
    with real_tiles("sm_90"):
        x, norm = torch.rand(3, 3, 2, 2048).half(), Norm(5, 1.0, 0.75, 2.0)
        _, argmax = lrn_max_pool2d_forward(x, norm, 2, Window(3, 2), (1, 1), save=True)
        given = (x, torch.ones(1, 1, 2, 2048).half(), argmax, norm, 2, Window(3, 2), (3, 3))
        dx = lrn_max_pool2d_backward(*given, mask=True)
        assert not masked(dx)
        assert torch.equal(dx, lrn_max_pool2d_backward(*given))


def test_a_gradient_as_it_came_has_no_sums() -> None:
    gradient = torch.zeros(2, 3)
    assert not masked(gradient)
    assert taken(gradient) is None
    assert masked(hand_over(gradient))
    assert taken(gradient) is None
    gradient += 1
    assert not masked(gradient)


def test_an_empty_batch_hands_no_sums_over() -> None:
    """Its gradients are zero, and so are its updates."""
    y = x = torch.zeros(0, 8, 5, 5, requires_grad=True)
    leaves: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(2):
        w, b = torch.randn(8, 8, 3, 3).requires_grad_(), torch.randn(8).requires_grad_()
        rate = torch.tensor([0.1, 0.9, 0.0])
        update = Updates(*(MomentumUpdate(p, torch.zeros_like(p), rate, "torch") for p in (w, b)))
        leaves += [(w, w.detach().clone()), (b, b.detach().clone())]
        y = fk.conv2d_relu(y, w, b, padding=1, update=update)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert all(torch.equal(now, before) for now, before in leaves)
