"""Convolution + bias + ReLU as torch's operator, with its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import aten
from ..common.arguments import autocast, interpretable, placed
from ..common.backend import operator, use_triton
from ..common.epilogue import epilogue_backward
from ..common.layout import as_hwnc, empty_nchw, hwnc_strided
from ..common.reduce import sum_partials
from ..conv2d import arguments
from ..conv2d.arguments import Padding
from ..conv2d.forward import (
    conv2d_relu_backward_input,
    conv2d_relu_forward,
    pack_weight,
)
from ..conv2d.weight import conv2d_relu_backward_weight


def _sides(padding: Sequence[int]) -> Padding:
    top, bottom, left, right = padding
    return (top, bottom), (left, right)


@operator("conv2d_relu")
def _conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    """conv2d_relu at stride 1; ``padding`` is top, bottom, left, right."""
    bias = None if bias is None else bias.contiguous()
    return conv2d_relu_forward(
        as_hwnc(input), pack_weight(weight), bias, _sides(padding), groups, relu
    )


@_conv2d_relu.register_fake
def _(input, weight, bias, padding, groups, relu):
    (N, _, H, W), (K, _, R, S), (top, bottom, left, right) = input.shape, weight.shape, padding
    return empty_nchw(input, (N, K, H + top + bottom - R + 1, W + left + right - S + 1))


@operator("conv2d_relu_backward")
def _conv2d_relu_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor | None,
    padding: Sequence[int],
    groups: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Those gradients of input, weight and bias that ``needs`` asks for."""
    need_x, need_w, need_b = needs
    dy, sides, size = as_hwnc(grad), _sides(padding), (input.shape[2], input.shape[3])
    rows = (-1, dy.shape[-1])
    y = None if output is None else as_hwnc(output).view(rows)
    flat, sums = epilogue_backward(dy.view(rows), y, need_dz=need_x or need_w, need_sums=need_b)
    dz = dy if flat is None else flat.view(dy.shape)
    gradients = []
    if need_x:
        dx, _ = conv2d_relu_backward_input(dz, pack_weight(weight), size, sides, groups)
        gradients.append(dx)
    if need_w:
        taps = (weight.shape[2], weight.shape[3])
        part = conv2d_relu_backward_weight(as_hwnc(input), dz, taps, sides, groups)
        dw = sum_partials(part, input.new_empty(part.shape[1:]))
        gradients.append(dw.permute(3, 2, 0, 1))
    if sums is not None:
        gradients.append(sum_partials(sums, weight.new_empty(len(weight))))
    return gradients


@_conv2d_relu_backward.register_fake
def _(grad, input, weight, output, padding, groups, needs):
    K, C, R, S = weight.shape
    dw = weight.new_empty((R, S, C, K)).permute(3, 2, 0, 1)
    made = (empty_nchw(grad, tuple(input.shape)), dw, weight.new_empty(K))
    return [gradient for gradient, need in zip(made, needs, strict=True) if need]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, ctx.padding, ctx.groups, relu = inputs
    ctx.save_for_backward(input, weight, output if relu else None)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    gradients = _conv2d_relu_backward(grad, *ctx.saved_tensors, ctx.padding, ctx.groups, needs)
    return (*placed(gradients, needs), None, None, None)


_conv2d_relu.register_autograd(_differentiate, setup_context=_save)


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | Padding = 0,
    groups: int = 1,
    relu: bool = True,
) -> Tensor:
    """Convolution + bias + ReLU in one pass, differentiable in input, weight and bias.

        relu(bias[k] + sum_{c, r, s} input[n, c, p * stride + r - top, q * stride + s - left]
                                     * weight[k, c, r, s])

    Args:
        input: [N, C, H, W], float32, bfloat16, float16 or float64, any strides.
        weight: [K, C / groups, R, S], of the input's dtype and device.
        bias: [K] or None.
        stride: pixels between outputs, an int or (height, width).
        padding: zeros around the image: an int, (height, width), or ((top, bottom), (left, right)).
        groups: input and output channels are split into this many independent groups.
        relu: whether negative outputs become zero.

    Returns:
        [N, K, P, Q] with P = (H + top + bottom - R) // stride + 1, and Q likewise. Sums are
        float32 and rounded once; float64 runs on ATen.

    Raises:
        TypeError: for a wrong type or dtype.
        ValueError: for a wrong shape, device, or a value out of range.
    """
    sides, strides = arguments.spell_out(padding, stride)
    input, weight, bias = autocast(input, weight, bias)
    arguments.check(input, weight, bias, sides, groups)
    if not use_triton(input):
        return aten.conv2d_relu(input, weight, bias, strides, sides, groups, relu)
    dtype = input.dtype
    input, weight, bias = interpretable(input, weight, bias)
    if strides != (1, 1):
        taps = (weight.shape[2], weight.shape[3])
        input = arguments.space_to_depth(input, taps, strides, sides, groups)
        weight = arguments.space_to_depth_weight(weight, strides)
        sides = ((0, 0), (0, 0))
    pads = [*sides[0], *sides[1]]
    output: Tensor = _conv2d_relu(hwnc_strided(input), weight, bias, pads, groups, relu)
    return output.to(dtype)
