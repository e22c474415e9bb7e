"""Cross-channel local response normalisation and overlapping max-pooling, one pass each way.

    d[i] = k + alpha / size * sum_{j in window(i)} x[j]^2        y[i] = x[i] d[i]^-beta
    out[p, q] = max over the window of pixels at (p, q) of y

The window of channel i is size channels wide, [i - size // 2, i + (size - 1) // 2], cut at the
borders of its group. The normalised map is never written. With g the gradient that pooling hands
back to y, and window'(i) the channels whose windows hold i,

    dx[i] = g[i] d[i]^-beta
            - 2 beta alpha / size * x[i] sum_{j in window'(i)} g[j] x[j] d[j]^(-beta-1)

The forward pass saves the position of each maximum inside its window as one byte. The backward
pass recomputes d, which costs less than reading it.

Layout HWNC: x [H, W, N, C], out and argmax [P, Q, N, C]. A program holds BLOCK_M rows, a row being
one pixel of one image in one line of the map, by the channels of one group, so that a window of
channels never leaves the program: its sum is `size` shifts along the channel axis.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.backend import interpreted
from ..common.dependent import wait_for_predecessor
from ..common.epilogue import epilogue_backward
from ..common.launch import launch
from ..common.layout import as_hwnc, as_nchw, empty_nchw
from ..common.parameters import Norm, Pooling
from ..common.reduce import fold
from ..common.tuned import tuned
from ..lrn_pool import alexnet

_BLOCK = 512  # elements a warp holds
_INTERPRETER_BLOCK = 1 << 18


@triton.jit
def _power(d, BETA: tl.constexpr):
    """d ** -BETA; for the papers' 0.75 by two square roots instead of a logarithm."""
    if BETA == 0.75:
        root = tl.math.rsqrt(d)
        result = root * tl.sqrt(root)
    else:
        result = tl.exp2(-BETA * tl.log2(d))
    return result


@triton.jit
def _shifted(v, shift, CHANNELS: tl.constexpr):
    """v[:, i + shift] for each channel i, 0 outside of [0, CHANNELS)."""
    source = tl.arange(0, v.shape[1])[None, :] + shift
    inside = (source >= 0) & (source < CHANNELS)
    index = tl.where(inside, source, 0) + tl.zeros(v.shape, tl.int32)
    return tl.where(inside, tl.gather(v, index, axis=1), 0.0)


@triton.jit
def _window_sum(v, BELOW: tl.constexpr, ABOVE: tl.constexpr, CHANNELS: tl.constexpr):
    """Sum v[:, i - BELOW .. i + ABOVE] for each channel i, as far as [0, CHANNELS) reaches."""
    total = tl.zeros(v.shape, tl.float32)
    if BELOW + ABOVE < 16:
        for shift in tl.static_range(-BELOW, ABOVE + 1):
            total += _shifted(v, shift, CHANNELS)
    else:  # unrolled, a window of a thousand channels would compile for minutes
        for shift in range(-BELOW, ABOVE + 1):
            total += _shifted(v, shift, CHANNELS)
    return total


@triton.jit
def _denominator(
    x, SIZE: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr, CHANNELS: tl.constexpr
):
    return OFFSET + SCALE * _window_sum(x * x, SIZE // 2, (SIZE - 1) // 2, CHANNELS)


@triton.jit
def _lrn_max_pool2d_fwd_kernel(
    x_ptr,  # [H, W, N, G * C]
    y_ptr,  # [P, Q, N, G * C]
    argmax_ptr,  # uint8 [P, Q, N, G * C], written where SAVE
    N,
    H,
    W,
    Q,
    G: tl.constexpr,
    C: tl.constexpr,
    LRN: tl.constexpr,
    SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    OFFSET: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    wait_for_predecessor()
    p = tl.program_id(1)
    g = tl.program_id(2)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # q * N + n
    offs_c = tl.arange(0, BLOCK_C)
    mask_m = offs_m < Q * N
    mask_c = (offs_c < C)[None, :]
    h = p * STRIDE
    w = offs_m // N * STRIDE
    row = (w * N + offs_m % N).to(tl.int64)
    x_ptrs = x_ptr + row[:, None] * (G * C) + (g * C + offs_c)[None, :]
    best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), tl.float32)
    argmax = tl.zeros((BLOCK_M, BLOCK_C), tl.int32)
    for i in range(tl.minimum(WINDOW, H - h)):
        for j in range(WINDOW):
            inside = (mask_m & (w + j < W))[:, None] & mask_c
            shift = (((h + i) * W + j) * N).to(tl.int64) * (G * C)
            x = tl.load(x_ptrs + shift, mask=inside, other=0.0).to(tl.float32)
            if LRN:
                x = x * _power(_denominator(x, SIZE, SCALE, OFFSET, C), BETA)
            # As torch: the first of equals wins, and a NaN beats everything.
            better = inside & ((x > best) | (x != x))
            best = tl.where(better, x, best)
            argmax = tl.where(better, i * WINDOW + j, argmax)
    out = (p * Q * N + offs_m).to(tl.int64)[:, None] * (G * C) + (g * C + offs_c)[None, :]
    mask = mask_m[:, None] & mask_c
    tl.store(y_ptr + out, best.to(y_ptr.dtype.element_ty), mask=mask)
    if SAVE:
        tl.store(argmax_ptr + out, argmax.to(tl.uint8), mask=mask)


@triton.jit
def _lrn_max_pool2d_bwd_kernel(
    x_ptr,  # [H, W, N, G * C], read where LRN
    dy_ptr,  # [P, Q, N, G * C]
    share_ptr,  # as dy, read where SHARED
    argmax_ptr,  # uint8 [P, Q, N, G * C]
    dx_ptr,  # [H, W, N, G * C]
    y_ptr,  # the pooled [P, Q, N, G * C], read where MASK and not LRN
    sum_ptr,  # float32 [programs, G * C], written where MASK
    N,
    W,
    P,
    Q,
    G: tl.constexpr,
    C: tl.constexpr,
    LRN: tl.constexpr,
    SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    OFFSET: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    SHARED: tl.constexpr,  # the gradient is dy and another share of it
    MASK: tl.constexpr,  # x comes from a ReLU: apply its mask too, and sum what is written
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    wait_for_predecessor()
    h = tl.program_id(1)
    g = tl.program_id(2)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # w * N + n
    offs_c = tl.arange(0, BLOCK_C)
    mask_m = offs_m < W * N
    mask_c = (offs_c < C)[None, :]
    w = offs_m // N
    n = offs_m % N
    channel = (g * C + offs_c)[None, :]
    # The windows that hold this pixel: p * STRIDE <= h < p * STRIDE + WINDOW, and so for q.
    p_lo = tl.maximum(h - WINDOW + STRIDE, 0) // STRIDE
    p_hi = tl.minimum(h // STRIDE + 1, P)
    grad = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for p in range(p_lo, p_hi):
        for back in range((WINDOW + STRIDE - 1) // STRIDE):
            q = w // STRIDE - back
            column = w - q * STRIDE
            inside = (mask_m & (q >= 0) & (q < Q) & (column < WINDOW))[:, None] & mask_c
            offs = ((p * Q + q) * N + n).to(tl.int64)[:, None] * (G * C) + channel
            here = ((h - p * STRIDE) * WINDOW + column)[:, None]
            argmax = tl.load(argmax_ptr + offs, mask=inside, other=0).to(tl.int32)
            dy = tl.load(dy_ptr + offs, mask=inside, other=0.0).to(tl.float32)
            if SHARED:
                dy += tl.load(share_ptr + offs, mask=inside, other=0.0).to(tl.float32)
            if MASK and not LRN:  # the maximum of a window is what its gradient goes to
                y = tl.load(y_ptr + offs, mask=inside, other=0.0).to(tl.float32)
                dy = tl.where(y <= 0, 0.0, dy)
            grad += tl.where(argmax == here, dy, 0.0)
    offs = (h * W * N + offs_m).to(tl.int64)[:, None] * (G * C) + channel
    mask = mask_m[:, None] & mask_c
    if LRN:
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        d = _denominator(x, SIZE, SCALE, OFFSET, C)
        scaled = grad * _power(d, BETA)
        # SCALE goes with 1 / d: apart, the largest and the smallest alpha leave float32's range.
        neighbours = _window_sum(scaled * (SCALE * x / d), (SIZE - 1) // 2, SIZE // 2, C)
        grad = scaled - 2.0 * BETA * x * neighbours
        if MASK:
            grad = tl.where(x <= 0, 0.0, grad)  # a NaN hands its gradient on, as in torch
    if MASK:
        program = (h * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        total = tl.sum(tl.where(mask, grad, 0.0), axis=0)
        tl.store(sum_ptr + program * (G * C) + g * C + offs_c, total, mask=offs_c < C)
    tl.store(dx_ptr + offs, grad.to(dx_ptr.dtype.element_ty), mask=mask)


def _options(
    x: Tensor, rows: int, pooling: Pooling, warps: int, kernel: str, sizes: tuple[int, ...]
) -> dict[str, Any]:
    """Constants and block of a kernel that goes over so many rows of maps like x [..., G*C]."""
    norm, groups, window = pooling
    C = x.shape[3] // groups
    n = norm or Norm(size=1, scale=0.0, beta=1.0, offset=1.0)
    block_c = triton.next_power_of_2(C)
    block = _INTERPRETER_BLOCK if interpreted() else _BLOCK * warps
    block_m = max(1, min(triton.next_power_of_2(max(rows, 1)), block // block_c))
    keys = (*sizes, x.shape[3], groups, *window, int(norm is not None))
    block_m, warps = tuned((block_m, warps), x, kernel, *keys)
    return {
        "G": groups, "C": C, "LRN": norm is not None,
        "SIZE": min(n.size, max(2 * C - 1, 1)),  # what reaches every channel from any
        "SCALE": n.scale, "BETA": n.beta, "OFFSET": n.offset, "WINDOW": window.size,
        "STRIDE": window.stride, "BLOCK_M": block_m, "BLOCK_C": block_c, "num_warps": warps,
    }  # fmt: skip


def lrn_max_pool2d_forward(
    x: Tensor, pooling: Pooling, size: tuple[int, int], save: bool
) -> tuple[Tensor, Tensor]:
    """y [N, G*C, P, Q] and argmax [P, Q, N, G*C] of x [H, W, N, G*C].

    Both are HWNC in memory; argmax is empty unless ``save``.
    """
    (H, W, N, GC), (P, Q), (norm, groups, window) = x.shape, size, pooling
    output = empty_nchw(x, (N, GC, P, Q))
    y = as_hwnc(output)
    argmax = torch.empty_like(y, dtype=torch.uint8) if save else x.new_empty(0, dtype=torch.uint8)
    if norm is not None and alexnet.fits(x, norm, groups, window):
        alexnet.forward(x, y, argmax, norm, groups, save)
        return output, argmax
    options = _options(x, Q * N, pooling, 4, "pool forward", (N, H, W, P, Q))
    launch(
        _lrn_max_pool2d_fwd_kernel, (triton.cdiv(Q * N, options["BLOCK_M"]), P, groups),
        x, y, argmax, N, H, W, Q, SAVE=save, **options, counted=H * W * N,
    )  # fmt: skip
    return output, argmax


def lrn_max_pool2d_backward(
    x: Tensor | None,
    dy: Tensor,
    argmax: Tensor,
    pooling: Pooling,
    size: tuple[int, int],
    mask: bool = False,
    y: Tensor | None = None,
    share: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dx [N, G*C, H, W] of dy and argmax [P, Q, N, G*C]; x is the forward's input, for LRN.

    A ``share`` is added to dy where that is read: of one tower, what the other one found.

    With ``mask`` a ReLU made the forward's input, and its backward is done here, too: dx is the
    gradient before the ReLU. With it come partials of its sum over all but the channels, float32
    [parts, G*C]. y is the output, which without LRN tells where the ReLU was open.
    """
    (P, Q, N, GC), (H, W), (norm, groups, window) = dy.shape, size, pooling
    result = empty_nchw(dy, (N, GC, H, W))
    dx = as_hwnc(result)
    if norm is not None and x is not None and alexnet.fits(x, norm, groups, window):
        sums = alexnet.backward(x, dy, share, argmax, dx, norm, groups, mask)
        if mask and sums is None:  # a program holds less than an image: a pass of its own
            rows = (-1, GC)
            flat, sums = epilogue_backward(dx.view(rows), x.reshape(rows), need_sums=True)
            assert flat is not None
            result = as_nchw(flat.view(dx.shape))
        return result, None if sums is None else fold(sums)
    # A program leaves one row of sums: fewer, larger ones where they take few registers.
    warps = 4 if norm is not None else 16
    options = _options(dy, W * N, pooling, warps, "pool backward", (N, H, W, P, Q))
    grid = (triton.cdiv(W * N, options["BLOCK_M"]), H, groups)
    sums = dx.new_empty((grid[0] * H if mask else 0, GC), dtype=torch.float32)
    launch(
        _lrn_max_pool2d_bwd_kernel, grid, dy if x is None else x, dy,
        dy if share is None else share, argmax, dx, dy if y is None else y, sums if mask else dx,
        N, W, P, Q, SHARED=share is not None, MASK=mask, **options, counted=H * W * N,
    )  # fmt: skip
    return result, fold(sums) if mask else None
