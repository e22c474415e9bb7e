"""How convolutions cut their channels into blocks, and hand them to the hardware."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common.arguments import aligned
from ..common.backend import has_tma
from ..common.tuned import cut


@triton.jit
def tap_range(first, last, pad: tl.constexpr, size, KERNEL: tl.constexpr):
    """Taps [lo, hi) of an axis that touch the image for some output in first..last."""
    return tl.maximum(pad - last, 0), tl.minimum(size + pad - first, KERNEL)


@triton.jit
def finish(
    acc, y_ptr, mask_ptr, sum_ptr, b_ptr, offs, offs_n, mask, g, K: tl.constexpr,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Bias and ReLU on a float32 block, or a ReLU's mask and the sums of columns; it is stored.

    Its rows are at ``offs`` [BLOCK_M, 1] of y, its columns the outputs ``offs_n`` of group g.
    """
    mask_n = offs_n < K
    if HAS_BIAS:
        b = tl.load(b_ptr + (g * K + offs_n), mask=mask_n, other=0.0)
        acc += b.to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)  # not tl.maximum, which would hide a NaN
    if MASK:
        kept = tl.load(mask_ptr + offs + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        acc = tl.where(kept <= 0, 0.0, acc)  # a NaN hands its gradient on, as in torch
        tl.store(sum_ptr + offs_n, tl.sum(acc, axis=0), mask=mask_n)
    tl.store(y_ptr + offs + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def next_tap(r, s, c, s_lo, s_hi, BLOCK_K: tl.constexpr, C: tl.constexpr):
    """Advance the odometer (r, s, c) of the flat reduction by one block of channels."""
    c += BLOCK_K
    wrap = c >= C
    c = tl.where(wrap, 0, c)
    s = tl.where(wrap, s + 1, s)
    wrap = s == s_hi
    return tl.where(wrap, r + 1, r), tl.where(wrap, s_lo, s), c


@triton.jit
def next_half(r, half, r_lo, r_hi):
    """Go on with the other half of the channels, after the last tap."""
    wrap = r == r_hi
    return tl.where(wrap, r_lo, r), tl.where(wrap, half + 1, half)


@triton.jit
def group_and_half(index, HALVES: tl.constexpr, APART: tl.constexpr):
    """Group of channels, and half of them, of a program that does one half if they are APART."""
    if HALVES > 1 and APART:
        return index * 0, index
    else:
        return index, index * 0


@triton.jit
def zeros(ROWS: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr):
    """Accumulators of ROWS by BLOCK_N and, where there is a tail, by TAIL_N."""
    block = tl.zeros((ROWS, BLOCK_N), tl.float32)
    if TAIL_N == 0:
        return (block,)
    else:
        return block, tl.zeros((ROWS, TAIL_N), tl.float32)


@triton.jit
def add_products(
    accs, i: tl.constexpr, a, b, b_tail, TAIL_N: tl.constexpr, PRECISION: tl.constexpr
):
    """Accumulators i and, where there is a tail, i + 1, with the products of ``a`` added."""
    block = tl.dot(a, b, accs[i], input_precision=PRECISION)
    if TAIL_N == 0:
        return (block,)
    else:
        return block, tl.dot(a, b_tail, accs[i + 1], input_precision=PRECISION)


def halved_warps(warps: int, block_m: int, block_n: int, bits: int) -> int:
    """Half the warps for half a tile: each then issues as many products for its bookkeeping.

    Not for float32, which has no tensor cores: four warps of a 64 x 64 tile spill.
    """
    return warps if bits == 32 or block_m * block_n > 64 * 128 else min(warps, 4)


def split_channels(block: int, size: int, least: int = 16) -> tuple[int, int]:
    """(block, tail) that fill ``size`` channels exactly where two powers of two can.

    The first is at least ``least``; else it is ``block``, cut to the size.
    """
    for main in (block, block // 2):
        tail = main // 2
        if main >= least and size % main == 0:
            return main, 0
        if main >= least and tail >= 16 and size % (main + tail) == 0:
            return main, tail
    return cut(block, size), 0


def tma_fits(groups: int, *operands: Tensor) -> bool:
    """Whether operands can be described to the tensor memory accelerator: 16-byte rows."""
    return has_tma(operands[0].device) and all(
        x.element_size() == 2
        and x.numel() > 0
        and x.shape[-1] // groups % 8 == 0
        and aligned(x)
        and math.prod(x.shape[:-1]) < 2**31
        for x in operands
    )


def row_blocks(matrix: Tensor, rows: int, block: int, tail: int) -> tuple[TensorDescriptor, ...]:
    """Descriptors of the rows of [..., channels], in blocks of channels and of those of a tail."""
    flat = matrix.view(-1, matrix.shape[-1])
    return tuple(TensorDescriptor.from_tensor(flat, [rows, b]) for b in (block, tail or block))
