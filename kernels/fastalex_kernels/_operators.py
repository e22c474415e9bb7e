"""The differentiable functions as operators of torch's, which torch.compile leaves as they are.

Dynamo traces the forward pass of an ``autograd.Function``, and cannot trace how a kernel is chosen
and launched. So a compiled graph holds one operator for each pass of a layer instead: it runs the
same code as the ``autograd.Function``, at run time, and its fake version says what comes out, to
the stride. Everything around it, casts and rearrangements, is compiled.

Without torch.compile these are not used: an operator costs more to call.

A list of results holds those that were asked for; numbers of one kind are passed as a list where a
function takes a tuple of them, as an operator's schema knows no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.library import custom_op

from fastalex_kernels import _aten
from fastalex_kernels._conv2d_arguments import Padding
from fastalex_kernels._layout import as_hwnc, empty_nchw
from fastalex_kernels._lrn_chunks import Norm, Window
from fastalex_kernels.augment import augment_forward, augment_output
from fastalex_kernels.conv2d_relu import Conv2dReLUFunction, pack_weight
from fastalex_kernels.linear_relu_dropout import LinearReLUDropoutFunction
from fastalex_kernels.lrn_max_pool2d import lrn_max_pool2d_backward, lrn_max_pool2d_forward

Tensor = torch.Tensor


class _Context:
    """What an ``autograd.Function`` is given in place of autograd's own context."""

    def __init__(self, *saved: Any, needs: Sequence[bool] = (), **attributes: Any) -> None:
        self.saved_tensors = saved
        self.needs_input_grad = tuple(needs)
        vars(self).update(attributes)

    def save_for_backward(self, *saved: Any) -> None:
        self.saved_tensors = saved


def _wanted(results: Sequence[Tensor | None]) -> list[Tensor]:
    return [x for x in results if x is not None]


def _placed(results: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """What ``_wanted`` left, each where its argument stands."""
    rest: Iterator[Tensor] = iter(results)
    return [next(rest) if need else None for need in needs]


def _sides(padding: Sequence[int]) -> Padding:
    top, bottom, left, right = padding
    return (top, bottom), (left, right)


def _needs(ctx: Any) -> list[bool]:
    """Which of input, weight and bias want a gradient."""
    return list(ctx.needs_input_grad[:3])


@custom_op("fastalex::conv2d_relu", mutates_args=())
def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    return Conv2dReLUFunction.forward(
        _Context(), input, weight, bias, _sides(padding), groups, relu
    )


@conv2d_relu.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    (N, _, H, W), (K, _, R, S), (top, bottom, left, right) = input.shape, weight.shape, padding
    return empty_nchw(input, (N, K, H + top + bottom - R + 1, W + left + right - S + 1))


@custom_op("fastalex::conv2d_relu_backward", mutates_args=())
def _conv2d_relu_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor | None,
    padding: Sequence[int],
    groups: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    w = pack_weight(weight)
    attributes = {
        "padding": _sides(padding),
        "groups": groups,
        "update": None,
        "stride": 1,
        "mask": False,
        "source": None,
    }
    ctx = _Context(input, w, bias, output, needs=needs, **attributes)
    return _wanted(Conv2dReLUFunction.backward(ctx, grad))


@_conv2d_relu_backward.register_fake
def _(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor | None,
    padding: Sequence[int],
    groups: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    K, C, R, S = weight.shape
    N, GC, H, W = input.shape
    results: list[Tensor] = []
    if needs[0]:
        results.append(empty_nchw(grad, (N, GC, H, W)))
    if needs[1]:
        results.append(weight.new_empty((R, S, C, K)).permute(3, 2, 0, 1))
    if needs[2] and bias is not None:
        results.append(bias.new_empty(bias.shape))
    return results


def _save_convolution(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, ctx.padding, ctx.groups, relu = inputs
    ctx.save_for_backward(input, weight, bias, output if relu else None)


def _differentiate_convolution(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = _needs(ctx)
    results = _conv2d_relu_backward(grad, *ctx.saved_tensors, ctx.padding, ctx.groups, needs)
    return (*_placed(results, needs), None, None, None)


conv2d_relu.register_autograd(_differentiate_convolution, setup_context=_save_convolution)


def _norm(fields: Sequence[float]) -> Norm | None:
    """The norm of an operator's list of numbers, empty where there is none."""
    if not fields:
        return None
    size, scale, beta, offset, signed = fields
    return Norm(int(size), scale, beta, offset, bool(signed))


@custom_op("fastalex::lrn_max_pool2d", mutates_args=())
def lrn_max_pool2d(
    input: Tensor,
    norm: Sequence[float],
    groups: int,
    window: Sequence[int],
    size: Sequence[int],
    save: bool,
) -> tuple[Tensor, Tensor]:
    height, width = size
    return lrn_max_pool2d_forward(
        as_hwnc(input), _norm(norm), groups, Window(*window), (height, width), save
    )


@lrn_max_pool2d.register_fake
def _(
    input: Tensor,
    norm: Sequence[float],
    groups: int,
    window: Sequence[int],
    size: Sequence[int],
    save: bool,
) -> tuple[Tensor, Tensor]:
    N, C = input.shape[:2]
    shape = (*size, N, C) if save else (0,)
    argmax = input.new_empty(shape, dtype=torch.uint8)
    return empty_nchw(input, (N, C, size[0], size[1])), argmax


@custom_op("fastalex::lrn_max_pool2d_backward", mutates_args=())
def _lrn_max_pool2d_backward(
    grad: Tensor,
    input: Tensor | None,
    argmax: Tensor,
    norm: Sequence[float],
    groups: int,
    window: Sequence[int],
    size: Sequence[int],
) -> Tensor:
    x = None if input is None else as_hwnc(input)
    height, width = size
    return lrn_max_pool2d_backward(
        x, as_hwnc(grad), argmax, _norm(norm), groups, Window(*window), (height, width)
    )


@_lrn_max_pool2d_backward.register_fake
def _(
    grad: Tensor,
    input: Tensor | None,
    argmax: Tensor,
    norm: Sequence[float],
    groups: int,
    window: Sequence[int],
    size: Sequence[int],
) -> Tensor:
    return empty_nchw(grad, (grad.shape[0], grad.shape[1], size[0], size[1]))


def _save_pooling(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, ctx.norm, ctx.groups, ctx.window, _, _ = inputs
    ctx.size = input.shape[2:]
    ctx.save_for_backward(input if ctx.norm else None, output[1])


def _differentiate_pooling(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    arguments = (ctx.norm, ctx.groups, ctx.window, ctx.size)
    dx = _lrn_max_pool2d_backward(grad, *ctx.saved_tensors, *arguments)
    return dx, None, None, None, None, None


lrn_max_pool2d.register_autograd(_differentiate_pooling, setup_context=_save_pooling)


@custom_op("fastalex::linear_relu_dropout", mutates_args=())
def linear_relu_dropout(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: float,
    relu: bool,
    rng: Tensor | None,
    row_offset: int,
    feature_offset: int,
) -> Tensor:
    return LinearReLUDropoutFunction.forward(
        _Context(), input, weight, bias, p, relu, rng, row_offset, feature_offset
    )


@linear_relu_dropout.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: float,
    relu: bool,
    rng: Tensor | None,
    row_offset: int,
    feature_offset: int,
) -> Tensor:
    return input.new_empty((input.shape[0], weight.shape[0]))


@custom_op("fastalex::linear_relu_dropout_backward", mutates_args=())
def _linear_relu_dropout_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor | None,
    rng: Tensor | None,
    p: float,
    row_offset: int,
    feature_offset: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    dropout = {"p": p, "row_offset": row_offset, "feature_offset": feature_offset}
    saved = (input, weight, bias, output, rng)
    ctx = _Context(*saved, needs=needs, dropout=dropout, update=None, mask=False, source=None)
    return _wanted(LinearReLUDropoutFunction.backward(ctx, grad))


@_linear_relu_dropout_backward.register_fake
def _(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor | None,
    rng: Tensor | None,
    p: float,
    row_offset: int,
    feature_offset: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    arguments = zip((input, weight, bias), needs, strict=True)
    return [x.new_empty(x.shape) for x, need in arguments if need and x is not None]


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, p, relu, rng, row_offset, feature_offset = inputs
    kept_rng = None if relu or rng is None else rng.clone()
    ctx.save_for_backward(input, weight, bias, output if relu else None, kept_rng)
    ctx.dropout = (p, row_offset, feature_offset)


def _differentiate_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = _needs(ctx)
    results = _linear_relu_dropout_backward(grad, *ctx.saved_tensors, *ctx.dropout, needs)
    return (*_placed(results, needs), None, None, None, None, None)


linear_relu_dropout.register_autograd(_differentiate_linear, setup_context=_save_linear)


@custom_op("fastalex::lrn", mutates_args=())
def lrn(
    input: Tensor, size: int, alpha: float, beta: float, k: float, groups: int
) -> tuple[Tensor, Tensor]:
    """LRN on torch's operators, which Dynamo can't trace either: they write into blocks."""
    ctx = _Context()
    output = _aten.LRNFunction.forward(ctx, input, size, alpha, beta, k, groups)
    (_, denominator) = ctx.saved_tensors
    return output, denominator


@lrn.register_fake
def _(
    input: Tensor, size: int, alpha: float, beta: float, k: float, groups: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input), torch.empty_like(_aten.rows_of_groups(input, groups))


@custom_op("fastalex::lrn_backward", mutates_args=())
def _lrn_backward(
    grad: Tensor,
    input: Tensor,
    denominator: Tensor,
    size: int,
    alpha: float,
    beta: float,
    groups: int,
) -> Tensor:
    constants = _aten.lrn_constants(denominator.shape[1], size, alpha, beta, groups)
    ctx = _Context(input, denominator, constants=constants)
    (dx,) = _wanted(_aten.LRNFunction.backward(ctx, grad))
    return dx


@_lrn_backward.register_fake
def _(
    grad: Tensor,
    input: Tensor,
    denominator: Tensor,
    size: int,
    alpha: float,
    beta: float,
    groups: int,
) -> Tensor:
    return torch.empty_like(input)


def _save_lrn(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, size, alpha, beta, _, groups = inputs
    ctx.save_for_backward(input, output[1])
    ctx.arguments = (size, alpha, beta, groups)


def _differentiate_lrn(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    dx = _lrn_backward(grad, *ctx.saved_tensors, *ctx.arguments)
    return dx, None, None, None, None, None


lrn.register_autograd(_differentiate_lrn, setup_context=_save_lrn)


@custom_op("fastalex::augment", mutates_args=())
def augment(
    images: Tensor,
    tops: Tensor,
    lefts: Tensor,
    mirrors: Tensor,
    colors: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    centred: bool,
    size: int,
    padding: Sequence[int],
    block: int,
    lines: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    given = (images, tops, lefts, mirrors, colors, mean, scale, centred, size)
    height, width = lines
    return augment_forward(*given, _sides(padding), block, (height, width), dtype)


@augment.register_fake
def _(
    images: Tensor,
    tops: Tensor,
    lefts: Tensor,
    mirrors: Tensor,
    colors: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    centred: bool,
    size: int,
    padding: Sequence[int],
    block: int,
    lines: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return augment_output(images, block, lines, dtype)
