"""Response normalisation and max-pooling as torch's operator, with its gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import aten
from ..common.arguments import (
    check_groups,
    check_int,
    check_number,
    check_tensor,
    expect,
    interpretable,
)
from ..common.backend import operator, use_triton
from ..common.layout import as_hwnc, empty_nchw, hwnc_strided
from ..common.parameters import Norm, Pooling, Window, norm_of
from ..lrn_pool.general import lrn_max_pool2d_backward, lrn_max_pool2d_forward

MAX_KERNEL_SIZE = 15  # the position of a maximum is one byte
MAX_CHANNELS = 4096  # of one group: they share a program


def pooled_size(size: int, kernel_size: int, stride: int, ceil_mode: bool) -> int:
    """How many windows fit in ``size`` pixels; with ceil_mode the last may hang over the end."""
    extra = stride - 1 if ceil_mode else 0
    count = (size - kernel_size + extra) // stride + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= size else count


def _pooling(norm: Sequence[float], groups: int, window: Sequence[int]) -> Pooling:
    return Pooling(norm_of(norm) if norm else None, groups, Window(*window))


@operator("lrn_max_pool2d")
def _lrn_max_pool2d(
    input: Tensor,
    norm: Sequence[float],
    groups: int,
    window: Sequence[int],
    size: Sequence[int],
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and where each maximum was, if ``save``."""
    pooling = _pooling(norm, groups, window)
    return lrn_max_pool2d_forward(as_hwnc(input), pooling, (size[0], size[1]), save)


@_lrn_max_pool2d.register_fake
def _(input, norm, groups, window, size, save):
    N, C = input.shape[:2]
    argmax = input.new_empty((*size, N, C) if save else (0,), dtype=torch.uint8)
    return empty_nchw(input, (N, C, *size)), argmax


@operator("lrn_max_pool2d_backward")
def _lrn_max_pool2d_backward(
    grad: Tensor,
    input: Tensor | None,
    argmax: Tensor,
    norm: Sequence[float],
    groups: int,
    window: Sequence[int],
    size: Sequence[int],
) -> Tensor:
    x, pooling = None if input is None else as_hwnc(input), _pooling(norm, groups, window)
    return lrn_max_pool2d_backward(x, as_hwnc(grad), argmax, pooling, (size[0], size[1]))[0]


@_lrn_max_pool2d_backward.register_fake
def _(grad, input, argmax, norm, groups, window, size):
    return empty_nchw(grad, (*grad.shape[:2], *size))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, *pooling, _, _ = inputs
    ctx.arguments = (*pooling, input.shape[2:])
    ctx.save_for_backward(input if pooling[0] else None, output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    dx = _lrn_max_pool2d_backward(grad, *ctx.saved_tensors, *ctx.arguments)
    return dx, None, None, None, None, None


_lrn_max_pool2d.register_autograd(_differentiate, setup_context=_save)


def _check_window(input: Tensor, kernel_size: int, stride: int, ceil_mode: bool) -> tuple[int, int]:
    """Check the arguments of pooling; return the size of its output."""
    check_tensor("input", input)
    is_maps = input.dim() == 4 and input.shape[1] > 0
    expect(is_maps, "input", "[N, C, H, W], got shape {}", tuple(input.shape))
    check_int("kernel_size", kernel_size, 1, MAX_KERNEL_SIZE)
    check_int("stride", stride, 1, 1 << 15)
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"ceil_mode: expected True or False, got {ceil_mode!r}")
    height, width = (pooled_size(s, kernel_size, stride, ceil_mode) for s in input.shape[2:])
    expected = "room for a window of {} with stride {}, got {} x {} pixels"
    expect(min(height, width) > 0, "input", expected, kernel_size, stride, *input.shape[2:])
    return height, width


def _check_lrn(channels: int, size: int, alpha: float, beta: float, k: float, groups: int) -> None:
    check_int("size", size, 1, 2**31)
    for name, value in (("alpha", alpha), ("beta", beta), ("k", k)):
        check_number(name, value)
        expect(math.isfinite(value), name, "a finite number, got {}", value)
    expect(k > 0, "k", "a positive number, got {}", k)
    check_groups(groups, channels)


def lrn_max_pool2d(
    input: Tensor,
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 2.0,
    groups: int = 1,
    kernel_size: int = 3,
    stride: int = 2,
    ceil_mode: bool = False,
    signed: bool = True,
) -> Tensor:
    """Local response normalisation across channels, then max-pooling, in one pass.

        max over each window of  x[i] * (k + alpha / size * sum_{j near i} x[j]^2) ^ -beta

    ``alpha`` is divided by ``size``, as ``torch.nn.LocalResponseNorm`` and the authors' program do;
    the formula as printed in the paper (P§3.3) does not divide, and needs ``alpha * size`` here.

    Args:
        input: [N, C, H, W], float32, bfloat16, float16 or float64, any strides.
        size: channels in a window, [i - size // 2, i + (size - 1) // 2].
        alpha, beta, k: the constants of the formula.
        groups: the window never crosses a border between these equal groups of channels.
        kernel_size, stride: of the pooling, in pixels; kernel_size 1 with stride 1 pools nothing.
        ceil_mode: whether the last window may hang over the bottom and right edges.
        signed: False promises that no input is negative, as after a ReLU; a little faster.

    Returns:
        [N, C, P, Q]. Of equal maxima the first takes the gradient; a NaN is kept.

    Raises:
        TypeError, ValueError: naming the argument and what came.

    Source: P§3.3 and P§3.4; S:layer.py:1183 for the division.
    """
    pooled = _check_window(input, kernel_size, stride, ceil_mode)
    _check_lrn(input.shape[1], size, alpha, beta, k, groups)
    norm, window = Norm(size, alpha / size, beta, k, signed), Window(kernel_size, stride)
    if not use_triton(input) or input.shape[1] // groups > MAX_CHANNELS:
        return aten.lrn_max_pool2d(input, norm, groups, window, ceil_mode, pooled)
    return _apply(input, Pooling(norm, groups, window), pooled)


def max_pool2d(
    input: Tensor, kernel_size: int = 3, stride: int = 2, ceil_mode: bool = False
) -> Tensor:
    """Max-pooling: the maximum over each kernel_size x kernel_size window of pixels.

    Args:
        input: [N, C, H, W], float32, bfloat16, float16 or float64, any strides.
        kernel_size, stride: in pixels; overlapping where the stride is smaller.
        ceil_mode: whether the last window may hang over the bottom and right edges.

    Returns:
        [N, C, P, Q]. Of equal maxima the first takes the gradient; a NaN is kept.

    Raises:
        TypeError, ValueError: naming the argument and what came.
    """
    pooled = _check_window(input, kernel_size, stride, ceil_mode)
    if not use_triton(input):
        return aten.max_pool2d(input, kernel_size, stride, ceil_mode)
    pooling = Pooling(None, channel_groups(input.shape[1]), Window(kernel_size, stride))
    return _apply(input, pooling, pooled)


def channel_groups(channels: int) -> int:
    """Groups of channels for pooling alone, where any split will do: the widest that fit."""
    return next(g for g in range(1, channels + 1) if channels % g == 0 and channels // g <= 256)


def _apply(input: Tensor, pooling: Pooling, pooled: tuple[int, int]) -> Tensor:
    (wide,), (norm, groups, window) = interpretable(input), pooling
    save = wide.requires_grad and torch.is_grad_enabled()
    numbers = [] if norm is None else list(map(float, norm))
    output, _ = _lrn_max_pool2d(hwnc_strided(wide), numbers, groups, window, pooled, save)
    return output.to(input.dtype)  # type: ignore[no-any-return]
