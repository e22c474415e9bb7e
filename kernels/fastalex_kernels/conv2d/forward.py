"""The kernels of convolution + bias + ReLU, forward and input gradient.

    y[n, k, p, q] = relu(b[k] + sum_{c, r, s} x[n, c, p + r - top, q + s - left] w[k, c, r, s])

Everything inside is HWNC (layout.py): x [H, W, N, G*C], y [P, Q, N, G*K], and the weight packed
as [R, S, C, G*K], for G groups of C input and K output channels. A row is one pixel of one image,
row = (p * Q + q) * N + n, and a tap (r, s) of a tile of rows is that tile of x shifted by
(r * W + s) * N rows. One of two towers has the channels of x, and of its gradient, in two halves
one after the other: [2, H, W, N, C], as towers exchange them; there G is 1. So:

* the forward kernel runs one flat loop over (r, s, c), and leaves out the taps that fall off the
  border for the whole tile, which zero padding would multiply;
* the input gradient is the same kernel, over dz with the taps reversed and the weight's channel
  axes exchanged;
* the weight gradient takes a tap, or those of a line, by channels and reduces over rows for which a
  tap lies inside the image: contiguous runs in both operands, so nothing is gathered.

A stride is removed beforehand: space-to-depth by s turns R x R, stride s on C channels into
ceil(R/s) x ceil(R/s), stride 1 on s*s*C. For the first layer, 11 x 11 stride 4 on 3 channels
becomes 3 x 3 on 48, whose rows load 16 bytes at a time.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.backend import TRITON, target
from ..common.blocks import load_block
from ..common.dependent import wait_for_predecessor
from ..common.launch import launch
from ..common.layout import as_hwnc, as_nchw, empty_nchw
from ..common.reduce import fold
from ..common.tuned import cut, dot_precision, own_tile, tile_entry
from ..conv2d.arguments import Padding, space_to_depth_weight
from ..conv2d.pixels import conv2d_relu_fwd_tma_kernel, descriptors, pixel_tile
from ..conv2d.tiles import (
    finish,
    group_and_half,
    halved_warps,
    next_half,
    next_tap,
    split_channels,
    tap_range,
    tma_fits,
)

warp_specialized: Any = None  # where Gluon lacks the names that it is written in
if TRITON >= (3, 9):
    with contextlib.suppress(ImportError):
        from ..conv2d import warp_specialized

# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages) by target and operand width, cut to the layer.
# What bounds the stages is shared memory: 227 KB on sm_90 and sm_100, 163 KB on sm_80, 99 KB on
# sm_86, sm_89 and sm_120 ("other"), of which two programs share 100 there, 64 KB on gfx942.
_FORWARD_TILES = {
    ("sm_80", 16): (128, 128, 64, 8, 3),
    ("sm_90", 16): (128, 128, 64, 8, 4),
    ("sm_100", 16): (128, 128, 64, 8, 4),
    ("gfx942", 16): (128, 128, 32, 8, 2),
    ("other", 16): (128, 64, 64, 4, 3),  # takes 48 channels as 32 + 16
    ("other", "tf32"): (128, 64, 32, 4, 3),
    ("sm_90", "tf32"): (128, 128, 32, 8, 3),
    ("sm_90", 32): (64, 64, 32, 8, 4 if TRITON < (3, 9) else 3),  # each spills with the other
    ("other", 32): (64, 64, 32, 8, 3),
    "interpreter": (2048, 512, 512, 4, 1),  # where an operation costs the same at any size
}


@triton.jit
def _conv2d_relu_fwd_kernel(
    x_ptr,  # [H, W, N, G * C], in HALVES [2, H, W, N, C]
    w_ptr,  # [R, S, C, G * K], of the input gradient [R, S, K, G * C]; in HALVES 2 * C, 2 * K
    b_ptr,  # [G * K], read where HAS_BIAS
    y_ptr,  # [P, Q, N, G * K], of the input gradient in HALVES [2, P, Q, N, K]
    mask_ptr,  # as y, read where MASK
    sum_ptr,  # float32 [blocks of rows, G * K, or 2 * K], written where MASK
    N,
    H,
    W,
    P,
    Q,
    G: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    HALVES: tl.constexpr,  # 2: the channels of the forward's input are those of two tensors
    REVERSE: tl.constexpr,  # take the taps in reverse order: the input gradient
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    MASK: tl.constexpr,  # y is the gradient of a ReLU's output: mask it and sum its columns
    ONE_PIXEL: tl.constexpr,  # BLOCK_M divides N: a tile is one output pixel, no row is masked
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,  # more output channels, in an accumulator of their own: 192 = 128 + 64
    BLOCK_K: tl.constexpr,
    TAIL_K: tl.constexpr,  # the rest of a tap's channels: 48 = 32 + 16
):
    wait_for_predecessor()
    N_BLOCKS: tl.constexpr = (K + BLOCK_N + TAIL_N - 1) // (BLOCK_N + TAIL_N)
    C_EVEN: tl.constexpr = C % (BLOCK_K + TAIL_K) == 0
    W_EVEN: tl.constexpr = C_EVEN and K % (BLOCK_N + TAIL_N) == 0
    W_GROUP: tl.constexpr = C if REVERSE else K
    W_C: tl.constexpr = 1 if REVERSE else G * K
    W_K: tl.constexpr = G * C if REVERSE else 1
    pid = tl.program_id(0)
    g, half = group_and_half(tl.program_id(1), HALVES, REVERSE)
    # Rows that need every tap first, the lighter ones of the borders at the end.
    rows = P * Q * N
    m_blocks = (rows + BLOCK_M - 1) // BLOCK_M
    BORDER: tl.constexpr = PAD_H if PAD_H > 0 else 0
    first = (pid // N_BLOCKS + BORDER * Q * N // BLOCK_M) % m_blocks * BLOCK_M
    last = tl.minimum(first + BLOCK_M, rows) - 1
    p_first = first // (Q * N)
    p_last = last // (Q * N)
    q_first = first // N - p_first * Q
    q_last = last // N - p_last * Q
    if not ONE_PIXEL:  # a tile that spans lines of the image may hold any column
        q_first = tl.where(p_first == p_last, q_first, 0)
        q_last = tl.where(p_first == p_last, q_last, Q - 1)
    r_lo, r_hi = tap_range(p_first, p_last, PAD_H, H, R)
    s_lo, s_hi = tap_range(q_first, q_last, PAD_W, W, S)
    CHUNKS: tl.constexpr = (C + BLOCK_K + TAIL_K - 1) // (BLOCK_K + TAIL_K)
    steps = tl.maximum(r_hi - r_lo, 0) * tl.maximum(s_hi - s_lo, 0) * CHUNKS
    if not REVERSE:
        steps *= HALVES

    offs_m = first + tl.arange(0, BLOCK_M)
    offs_n = pid % N_BLOCKS * (BLOCK_N + TAIL_N) + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < rows
    mask_n = offs_n < K
    # The row of x under tap (0, 0).
    if ONE_PIXEL:  # counted from the first, and so in 32 bits: half the registers
        x_row = ((p_first - PAD_H) * W + q_first - PAD_W) * N + first % N
        x_ptr += x_row.to(tl.int64) * (G * C)
        row = tl.arange(0, BLOCK_M)
    else:  # and where it stands in the image (h, w)
        h = offs_m // (Q * N) - PAD_H
        w = offs_m // N - (h + PAD_H) * Q - PAD_W
        row = ((h * W + w) * N + offs_m % N).to(tl.int64)
    x_ptrs = x_ptr + row[:, None] * (G * C) + (g * C + offs_k)[None, :]
    w_offs = g * W_GROUP + offs_k[:, None] * W_C + offs_n[None, :] * W_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TAIL_N > 0:
        tail_n = pid % N_BLOCKS * (BLOCK_N + TAIL_N) + BLOCK_N + tl.arange(0, TAIL_N)
        w_tail = g * W_GROUP + offs_k[:, None] * W_C + tail_n[None, :] * W_K
        acc_n = tl.zeros((BLOCK_M, TAIL_N), tl.float32)
    if TAIL_K > 0:
        tail_k = BLOCK_K + tl.arange(0, TAIL_K)
        x_tail = x_ptr + row[:, None] * (G * C) + (g * C + tail_k)[None, :]
        w_tail = g * W_GROUP + tail_k[:, None] * W_C + offs_n[None, :] * W_K

    r = r_lo
    s = s_lo
    c = first * 0
    for _ in range(steps):
        shift = ((r * W + s) * N).to(tl.int64) * (G * C) + c
        if HALVES > 1 and not REVERSE:
            shift += (half * H * W * N).to(tl.int64) * C
        tap = R * S - 1 - (r * S + s) if REVERSE else r * S + s
        w_tap = w_ptr + ((tap * HALVES + half) * (G * C * K) + c * W_C)
        mask_k = offs_k < C - c
        inside = mask_m
        if not ONE_PIXEL:
            inside = mask_m & (h + r >= 0) & (h + r < H) & (w + s >= 0) & (w + s < W)
        a = load_block(x_ptrs + shift, inside, mask_k, ONE_PIXEL, C_EVEN)
        b = load_block(w_tap + w_offs, mask_k, mask_n, W_EVEN, W_EVEN)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if TAIL_N > 0:
            b = load_block(w_tap + w_tail, mask_k, mask_n, W_EVEN, True)
            acc_n = tl.dot(a, b, acc_n, input_precision=PRECISION)
        if TAIL_K > 0:
            a = load_block(x_tail + shift, inside, mask_k, ONE_PIXEL, True)
            b = load_block(w_tap + w_tail, mask_k, mask_n, True, W_EVEN)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        r, s, c = next_tap(r, s, c, s_lo, s_hi, BLOCK_K + TAIL_K, C)
        if HALVES > 1 and not REVERSE:
            r, half = next_half(r, half, r_lo, r_hi)

    # Counted from the first row, and so in 32 bits.
    start = first.to(tl.int64) * (G * K) + g * K
    sums = sum_ptr + (first // BLOCK_M).to(tl.int64) * (G * K) + g * K
    if HALVES > 1 and REVERSE:
        start += (half * rows).to(tl.int64) * K
        sums += (first // BLOCK_M).to(tl.int64) * K + half * K
    offs = tl.arange(0, BLOCK_M)[:, None] * (G * K)
    out = y_ptr + start
    kept = mask_ptr + start
    mask = mask_m[:, None] & mask_n[None, :]
    finish(acc, out, kept, sums, b_ptr, offs, offs_n, mask, g, K, HAS_BIAS, RELU, MASK)
    if TAIL_N > 0:
        mask = mask_m[:, None] & (tail_n < K)[None, :]
        finish(acc_n, out, kept, sums, b_ptr, offs, tail_n, mask, g, K, HAS_BIAS, RELU, MASK)


def _forward_tile(x: Tensor, kernel: str, sizes: tuple[int, ...]) -> dict[str, int]:
    """Blocks for ``sizes``: images, rows and columns of the output, channels of a group, ..."""
    N, P, Q, C, K = sizes[:5]
    block_m, block_n, block_k, warps, stages = tile_entry(_FORWARD_TILES, x, kernel, *sizes)
    block_m, bits = cut(block_m & -block_m, P * Q * N), 8 * x.element_size()
    if target(x.device) == "interpreter":
        (n, tail_n), (k, tail_k) = (cut(block_n, K), 0), (cut(block_k, C), 0)
    else:
        n, tail_n = split_channels(block_n, K, max(16, block_n // 2))
        k, tail_k = split_channels(block_k, C)
    if tail_k and k + tail_k != C:  # a tail ends every tap, so there is one chunk a tap
        k, tail_k = cut(block_k, C), 0
    if tail_k and bits == 32:  # 32 + 16 spill
        k, tail_k = tail_k, 0
    if tail_n and tail_k:
        n, tail_n = cut(block_n, K), 0
    if tail_n and N % block_m and target(x.device) == "sm_80" and TRITON < (3, 9):
        k = min(k, 32)  # 64 with masked rows spill there
    return {
        "BLOCK_M": block_m, "BLOCK_N": n, "TAIL_N": tail_n, "BLOCK_K": k, "TAIL_K": tail_k,
        "num_warps": halved_warps(warps, block_m, n + tail_n, bits), "num_stages": stages,
    }  # fmt: skip


class _Taps(NamedTuple):
    """Which taps reach where."""

    size: tuple[int, int]  # of the output, height and width
    pad: tuple[int, int]  # of the input, above and to the left
    reverse: bool  # in reverse order, the weight's channels exchanged: the input gradient


def conv2d_relu_forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    padding: Padding,
    groups: int,
    relu: bool,
    out: Tensor | None = None,
) -> Tensor:
    """y [N, G*K, P, Q], HWNC in memory, of x [H, W, N, G*C] and the packed w [R, S, C, G*K].

    Of an x in halves, [2, H, W, N, C / 2], there is one group. Padding below 0 leaves rows of x
    out. ``out`` [P, Q, N, G*K] is written if given.
    """
    (R, S, _, _), (H, W, _, _), (top, bottom), (left, right) = w.shape, x.shape[-4:], *padding
    size = (H + top + bottom - R + 1, W + left + right - S + 1)
    return _convolve(x, w, _Taps(size, (top, left), False), groups, bias, relu, out=out)[0]


def conv2d_relu_backward_input(
    dz: Tensor,
    w: Tensor,
    size: tuple[int, int],
    padding: Padding,
    groups: int,
    mask: Tensor | None = None,
    halves: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """dx [N, G*C, H, W] of dz [P, Q, N, G*K]: the forward kernel, the weight's roles exchanged.

    Where a ReLU made the forward's input, ``mask`` [H, W, N, G*C], that ReLU's backward can be done
    here: dx then is the gradient before the ReLU, and what comes with it are partials of its sum
    over all but the channels, float32 [parts, G*C], the gradient of the bias there.

    With two ``halves`` dx is [2, H, W, N, C / 2], and so is the mask.
    """
    (R, S, _, _), (top, _), (left, _) = w.shape, *padding
    taps = _Taps(size, (R - 1 - top, S - 1 - left), True)
    return _convolve(dz, w, taps, groups, mask=mask, halves=halves)


def _convolve(
    x: Tensor,
    w: Tensor,
    taps: _Taps,
    groups: int,
    bias: Tensor | None = None,
    relu: bool = False,
    mask: Tensor | None = None,
    halves: int = 1,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    (H, W, N, GC), (R, S, rows, columns), ((P, Q), pad, reverse) = x.shape[-4:], w.shape, taps
    if not reverse and x.dim() > 4:
        halves = len(x)
    C, K = GC // groups, rows // halves if reverse else columns // groups
    axis = halves * groups if reverse else groups  # of programs with other outputs
    if reverse and halves > 1:
        output = y = x.new_empty((halves, P, Q, N, K))
    else:
        output = empty_nchw(x, (N, groups * K, P, Q)) if out is None else as_nchw(out)
        y = as_hwnc(output)
    name = "conv2d input" if reverse else "conv2d forward"
    sizes = (N, P, Q, C, K, R, S, axis)
    tile, counted = None, max(halves * _farthest_row((N, W, P, Q), (R, S), pad), w.numel())
    by_tma = tma_fits(groups, x, w) and C % 16 == 0
    if (
        by_tma
        and mask is None
        and halves == 1
        and warp_specialized is not None
        and warp_specialized.convolve(x, w, bias, y, taps, groups, relu, counted)
    ):
        return output, None
    if by_tma:
        run = S if reverse and mask is None and K % 8 == 0 and halves == 1 else 1
        own = own_tile(_FORWARD_TILES, x, name)
        tile = pixel_tile(own, x, name, sizes, mask is not None, run)
    if tile is not None:
        kernel, operands = conv2d_relu_fwd_tma_kernel, descriptors(x, w, tile, reverse)
        images, run = tile["BLOCK_M"], tile["RUN"]
        m_blocks, columns = P * Q * N // images, run * K
        counted = max(counted, N * groups * columns if run > 1 else 0)
        programs = triton.cdiv(P * triton.cdiv(Q, run), tile["RUNS"]) * (N // images)
        inside = run == 1 and pad == (0, 0) and (H - P, W - Q) == (R - 1, S - 1)
        options: dict[str, Any] = {"INSIDE": inside}
    else:
        kernel, operands = _conv2d_relu_fwd_kernel, (x, w)
        tile, columns = _forward_tile(x, name, sizes), K
        programs = m_blocks = triton.cdiv(P * Q * N, tile["BLOCK_M"])
        one_pixel = N % tile["BLOCK_M"] == 0
        options = {"ONE_PIXEL": one_pixel, "PRECISION": dot_precision(x, name)}
    grid = (programs * triton.cdiv(columns, tile["BLOCK_N"] + tile["TAIL_N"]), axis)
    sums = None
    if mask is not None:
        sums = y.new_empty((m_blocks, axis * K), dtype=torch.float32)
    launch(
        kernel, grid, *operands, *(y if t is None else t for t in (bias, y, mask, sums)),
        N, H, W, P, Q, G=groups, C=C, K=K, R=R, S=S, PAD_H=pad[0], PAD_W=pad[1],
        HALVES=halves, REVERSE=reverse, HAS_BIAS=bias is not None, RELU=relu,
        MASK=mask is not None, **tile, **options, counted=counted,
    )  # fmt: skip
    return output, None if sums is None else fold(sums)


def _farthest_row(
    sizes: tuple[int, ...], kernel_size: tuple[int, int], pad: tuple[int, int]
) -> int:
    """How far from 0 the forward kernel counts rows, in the padding too."""
    (N, W, P, Q), (R, S), (top, left) = sizes, kernel_size, pad
    h, w = max(abs(top), P + R - 2 - top), max(abs(left), Q + S - 2 - left)
    return max(P * Q, h * W + w + 1, abs(top) * Q) * N


def pack_weight(weight: Tensor, stride: int = 1) -> Tensor:
    """[R', S', stride * stride * C, G*K] of [G*K, C, R, S], as the kernels read it."""
    if stride > 1:
        weight = space_to_depth_weight(weight, (stride, stride))
    return weight.permute(2, 3, 1, 0).contiguous()
