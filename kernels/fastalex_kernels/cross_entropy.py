"""Softmax cross-entropy, the mean over a batch, and its gradient in the same pass.

With m the maximum of a row x, s = sum_c exp(x[c] - m), t its label and g the gradient of the mean,

    loss = 1 / N * sum over the rows of log(s) - (x[t] - m)
    dx[c] = (exp(x[c] - m) / s - [c = t]) * g / N

m and log(s) are never added up to the logsumexp: where logits are large, it would lose the digits
in which two of them differ. A training step knows g before its forward pass, and has losses and
gradient from one launch.

Layout: x, dx [N, C], contiguous. A program has BLOCK_M rows and goes through their columns in
blocks of BLOCK_C, twice where it makes a gradient: the second time they come from the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import aten
from .common.arguments import check_tensor, expect, interpretable
from .common.backend import interpreted, operator, use_triton
from .common.dependent import wait_for_predecessor
from .common.launch import launch
from .common.reduce import sum_partials

_COLUMNS = 1024  # of a block, at most
_BLOCK = 4096  # elements a program holds, in 8 warps: 4 rows of 1000 classes
_INTERPRETER_BLOCK = 1 << 16


@triton.jit
def _cross_entropy_kernel(
    x_ptr,  # [N, C]
    target_ptr,  # int64 [N]
    g_ptr,  # float32, read where GRADIENT
    loss_ptr,  # float32 [programs], their shares of the mean, written where LOSS
    dx_ptr,  # [N, C], written where GRADIENT
    N,
    C,
    LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGN: tl.constexpr,  # divides C, which the compiler cannot see for 1000
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    wait_for_predecessor()
    C = C // ALIGN * ALIGN
    program = tl.program_id(0)
    offs_m = program * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    # Past the end it is the last row over again, neither stored nor added.
    offs_m = tl.minimum(offs_m, N - 1)
    target = tl.load(target_ptr + offs_m)
    rows = offs_m.to(tl.int64)[:, None] * C
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    chosen = tl.zeros((BLOCK_M,), tl.float32)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        x = tl.load(
            x_ptr + rows + offs_c[None, :], mask=(offs_c < C)[None, :], other=float("-inf")
        ).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, axis=1))
        # Nothing but -inf so far: its exponentials are 0, and no difference of infinities.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base[:, None]), axis=1)
        chosen += tl.sum(tl.where(offs_c[None, :] == target[:, None], x, 0.0), axis=1)
        top = higher
    # A label that is no class gets NaN: a kernel cannot raise.
    valid = (target >= 0) & (target < C)
    if LOSS:
        loss = tl.where(valid, tl.log(total) - (chosen - top), float("nan"))
        tl.store(loss_ptr + program, tl.sum(tl.where(mask_m, loss, 0.0)) / N)
    if GRADIENT:
        scale = tl.where(valid, tl.load(g_ptr) / N, float("nan"))
        share = 1.0 / total
        for c in range(0, C, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            mask = mask_m[:, None] & (offs_c < C)[None, :]
            offs = rows + offs_c[None, :]
            x = tl.load(x_ptr + offs, mask=(offs_c < C)[None, :], other=0.0).to(tl.float32)
            dx = tl.exp(x - top[:, None]) * share[:, None]
            dx = tl.where(offs_c[None, :] == target[:, None], dx - 1.0, dx) * scale[:, None]
            tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _launch(
    x: Tensor, target: Tensor, g: Tensor | None, with_loss: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The mean loss in parts, and the gradient of x [N, C] times ``g``, each where asked for."""
    N, C = x.shape
    block_c = min(triton.next_power_of_2(C), _COLUMNS)  # whole rows, if they are no longer
    most = (_INTERPRETER_BLOCK if interpreted() else _BLOCK) // block_c
    block_m = min(triton.next_power_of_2(N), most)
    programs = triton.cdiv(N, block_m)
    part = x.new_empty(programs, dtype=torch.float32) if with_loss else None
    dx = None if g is None else torch.empty_like(x)
    launch(
        _cross_entropy_kernel, (programs,), x, target,
        *(x if t is None else t for t in (g, part, dx)), N, C, LOSS=with_loss,
        GRADIENT=g is not None, ALIGN=8 if C % 8 == 0 else 1, BLOCK_M=block_m, BLOCK_C=block_c,
        num_warps=8, counted=max(N, C),
    )  # fmt: skip
    return part, dx


def cross_entropy_forward(
    x: Tensor, target: Tensor, g: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The mean loss in parts, float32 [parts], and with ``g`` the gradient of x [N, C] times it."""
    part, dx = _launch(x, target, g, with_loss=True)
    assert part is not None
    return part, dx


@operator("cross_entropy")
def _cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    part, _ = cross_entropy_forward(input, target)
    return sum_partials(part, part.new_empty(()))


@_cross_entropy.register_fake
def _(input, target):
    return input.new_empty((), dtype=torch.float32)


@operator("cross_entropy_backward")
def _cross_entropy_backward(grad: Tensor, input: Tensor, target: Tensor) -> Tensor:
    _, dx = _launch(input, target, grad, with_loss=False)
    assert dx is not None
    return dx


@_cross_entropy_backward.register_fake
def _(grad, input, target):
    return torch.empty_like(input)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _cross_entropy_backward(grad, *ctx.saved_tensors), None


_cross_entropy.register_autograd(_differentiate, setup_context=_save)


def cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    """The mean over a batch of -log softmax(input)[target], differentiable in input.

    Args:
        input: logits [N, C], float32, bfloat16, float16 or float64, any strides.
        target: labels [N], int64, on the input's device. A kernel can't raise for a label outside
            of [0, C): the loss is NaN then, and so is that row of the gradient. On a CPU, torch
            raises IndexError. No label is ignored, as -100 is by ``F.cross_entropy``.

    Returns:
        float32 scalar, float64 of float64; NaN of an empty batch. Sums are float32; the gradient
        is rounded once, to the input's dtype, after it was multiplied.

    Raises:
        TypeError, ValueError: naming the argument and what came.

    Source: P§3.5, multinomial logistic regression.
    """
    check_tensor("input", input)
    is_logits = input.dim() == 2 and input.shape[1] > 0
    expect(is_logits, "input", "[N, classes], got shape {}", tuple(input.shape))
    check_tensor("target", target, (torch.int64,), input.device, tuple(input.shape[:1]))
    if not use_triton(input) or input.numel() == 0:
        return aten.cross_entropy(input, target)
    (wide,) = interpretable(input)
    loss: Tensor = _cross_entropy(wide.contiguous(), target.contiguous())
    return loss
