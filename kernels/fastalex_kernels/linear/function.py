"""Fully connected + bias + ReLU + dropout as torch's operator, with its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import aten
from ..common.arguments import (
    autocast,
    check_int,
    check_number,
    check_tensor,
    expect,
    interpretable,
    placed,
)
from ..common.backend import operator, use_triton
from ..common.epilogue import drop, epilogue_backward
from ..common.parameters import NO_DROPOUT, Dropout
from ..common.reduce import sum_partials
from ..linear.forward import Epilogue, matmul


@operator("linear_relu_dropout")
def _linear_relu_dropout(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: float,
    relu: bool,
    rng: Tensor | None,
    row_offset: int,
    feature_offset: int,
) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    rng = None if rng is None else rng.contiguous()
    dropout = Dropout(p, rng, row_offset, feature_offset)
    return matmul(input, weight.t(), Epilogue(bias, relu, dropout))


@_linear_relu_dropout.register_fake
def _(input, weight, bias, p, relu, rng, row_offset, feature_offset):
    return input.new_empty((input.shape[0], weight.shape[0]))


@operator("linear_relu_dropout_backward")
def _linear_relu_dropout_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor | None,
    rng: Tensor | None,
    p: float,
    offsets: Sequence[int],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Those gradients of input, weight and bias that ``needs`` asks for."""
    need_x, need_w, need_b = needs
    dy = grad.contiguous()
    dz, sums = epilogue_backward(
        dy, output, need_dz=need_x or need_w, need_sums=need_b, dropout=Dropout(p, rng, *offsets)
    )
    dz = dy if dz is None else dz
    gradients = []
    if need_x:
        gradients.append(matmul(dz, weight))
    if need_w:
        gradients.append(matmul(dz.t(), input))
    if sums is not None:
        gradients.append(sum_partials(sums, weight.new_empty(len(weight))))
    return gradients


@_linear_relu_dropout_backward.register_fake
def _(grad, input, weight, output, rng, p, offsets, needs):
    shapes = (input.shape, weight.shape, weight.shape[:1])
    return [weight.new_empty(s) for s, need in zip(shapes, needs, strict=True) if need]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, ctx.p, relu, rng, *ctx.offsets = inputs
    # With ReLU the output is the mask. Without, the caller may advance rng before backward.
    kept_rng = None if relu or rng is None else rng.clone()
    ctx.save_for_backward(input, weight, output if relu else None, kept_rng)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    gradients = _linear_relu_dropout_backward(grad, *ctx.saved_tensors, ctx.p, ctx.offsets, needs)
    return (*placed(gradients, needs), None, None, None, None, None)


_linear_relu_dropout.register_autograd(_differentiate, setup_context=_save)


@operator("dropout")
def _dropout(input: Tensor, p: float, rng: Tensor, row_offset: int, feature_offset: int) -> Tensor:
    return drop(input.contiguous(), Dropout(p, rng.contiguous(), row_offset, feature_offset))


@_dropout.register_fake
def _(input, p, rng, row_offset, feature_offset):
    return input.new_empty(input.shape)


def _save_dropout(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.p, rng, *ctx.offsets = inputs
    ctx.save_for_backward(rng.clone())  # the caller may advance it before backward


def _differentiate_dropout(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _dropout(grad, ctx.p, *ctx.saved_tensors, *ctx.offsets), None, None, None, None


_dropout.register_autograd(_differentiate_dropout, setup_context=_save_dropout)


def _check_input(input: Tensor) -> None:
    check_tensor("input", input)
    expect(input.dim() == 2, "input", "[N, in_features], got shape {}", tuple(input.shape))


def _check_parameters(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensor("weight", weight, (input.dtype,), input.device)
    fits, shape = weight.dim() == 2 and weight.shape[1] == input.shape[1], tuple(weight.shape)
    expect(fits, "weight", "[out_features, {}], got shape {}", input.shape[1], shape)
    if bias is not None:
        check_tensor("bias", bias, (input.dtype,), input.device, shape[:1])


def _check_dropout(input: Tensor, features: int, dropout: Dropout) -> None:
    """Check what is dropped of [rows of input, features]."""
    p, rng, row_offset, feature_offset = dropout
    check_int("row_offset", row_offset, 0, 2**31 - max(input.shape[0], 1))
    check_int("feature_offset", feature_offset, 0, 2**31 - max(features, 1))
    check_number("p", p)
    expect(0.0 <= p < 1.0, "p", "a probability in [0, 1), got {}", p)
    if rng is not None:
        check_tensor("rng", rng, (torch.int64,), input.device, (2,))


def _drawn(dropout: Dropout, training: bool, device: torch.device) -> Dropout:
    """With a fresh (seed, offset) from torch's generator where none is given."""
    if not training or dropout.p == 0:
        return NO_DROPOUT
    if dropout.rng is None:
        rng = torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)
        dropout = dropout._replace(rng=rng)
    return dropout


def linear_relu_dropout(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = 0.5,
    relu: bool = True,
    training: bool = True,
    rng: Tensor | None = None,
    row_offset: int = 0,
    feature_offset: int = 0,
) -> Tensor:
    """dropout(relu(input @ weight.T + bias)), differentiable in input, weight and bias.

    Whether element (m, n) is dropped depends on (seed, offset, row_offset + m, feature_offset + n)
    alone: one GPU, two towers and any split of a batch drop the same units.

    Args:
        input: [N, in_features], float32, bfloat16, float16 or float64, any strides.
        weight: [out_features, in_features], of the input's dtype and device.
        bias: [out_features] or None.
        p: probability that an element is dropped, in [0, 1); the kept are scaled by 1 / (1 - p).
        relu: whether negative values become zero.
        training: False drops nothing.
        rng: int64 tensor (seed, offset) on the input's device; None draws one from torch's
            generator.
        row_offset: this batch's first row in the whole batch.
        feature_offset: this layer's first feature in the whole layer.

    Returns:
        [N, out_features]. Sums are float32 and rounded once; float64 runs on ATen.

    Raises:
        TypeError, ValueError: naming the argument and what came.

    Source: P§4.2; the scaling in training is the same function as halving at test.
    """
    input, weight, bias = autocast(input, weight, bias)
    _check_input(input)
    _check_parameters(input, weight, bias)
    dropout = Dropout(p, rng, row_offset, feature_offset)
    _check_dropout(input, weight.shape[0], dropout)
    dropout = _drawn(dropout, training, input.device)
    if not use_triton(input):
        return aten.linear_relu_dropout(input, weight, bias, relu, dropout)
    dtype = input.dtype
    input, weight, bias = interpretable(input, weight, bias)
    p, *rest = dropout
    output: Tensor = _linear_relu_dropout(input, weight, bias, p, relu, *rest)
    return output.to(dtype)


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    rng: Tensor | None = None,
    row_offset: int = 0,
    feature_offset: int = 0,
) -> Tensor:
    """Dropout alone, with the mask of ``linear_relu_dropout``; input is [N, features]."""
    _check_input(input)
    given = Dropout(p, rng, row_offset, feature_offset)
    _check_dropout(input, input.shape[1], given)
    given = _drawn(given, training, input.device)
    if given.rng is None:
        return input
    if not use_triton(input):
        return aten.dropout(input, given)
    (wide,) = interpretable(input)
    return _dropout(wide, *given).to(input.dtype)  # type: ignore[no-any-return]
