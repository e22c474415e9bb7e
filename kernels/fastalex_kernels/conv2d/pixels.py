"""The forward kernel for whole pixels: neighbours share blocks of the weight, and of x.

    y[n, k, p, q] = relu(b[k] + sum_{c, r, s} x[n, c, p + r - top, q + s - left] w[k, c, r, s])

A program takes 128 images of up to three pixels that follow each other in the output, and a block
of its channels. For each tap it fetches the block of the weight once, and a block of x for each
pixel, by the tensor memory accelerator. More pixels load less through L2, but make fewer and
longer programs: ``_best_runs`` takes the number with which the last program ends first.

An input gradient with few channels would leave the columns of a product empty: conv2's has 48.
There a run of T neighbours of a line takes the place of a pixel. For a block of dz in column j,
pixel w + t needs tap s = w + t + left - j: the taps of neighbours are neighbours, and in the packed
weight [R, S * C, G * K] they are T * C rows one after the other, the columns of one product.

The taps are those that some pixel of a program needs. For the others x, or the weight, is zero
there, as the accelerator reads outside of a tensor. Zeros times an infinity are NaN. Sums are added
in the order of one pixel alone, with zeros between.

Layout: x [H, W, N, G * C], y [P, Q, N, G * K], HWNC in memory; or halves (see ``forward``).
"""

from __future__ import annotations

import functools
import math

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common.backend import target
from ..common.dependent import wait_for_predecessor
from ..common.tuned import PROCESSORS, Tile, cut, tuned
from ..conv2d.tiles import (
    add_products,
    finish,
    group_and_half,
    halved_warps,
    next_half,
    next_tap,
    split_channels,
    tap_range,
    zeros,
)

_MOST_SUMS = 3 * 128 * 128  # of a program of 8 warps: 192 registers a thread
_MOST_MASKED_SUMS = 2 * 128 * 128  # more spill
_STAGES_BYTES = 192 << 10  # of shared memory
_ROW_CYCLES = 0.9  # in which a processor gets 16 channels of a row from L2: 8 TB/s of an H100


@triton.jit
def _load_weight(
    desc, r, s, c, g, half, k, C: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    S: tl.constexpr, HALVES: tl.constexpr, REVERSE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block [reduction, outputs] under tap (r, s) of the weight, or of the reversed one."""
    if REVERSE:  # rows are outputs; those of the next tap follow, which the next pixel needs
        block = desc.load([R - 1 - r, ((S - 1 - s) * HALVES + half) * K + k, g * C + c])
        block = block.reshape(BLOCK_N, BLOCK_K).T
    else:
        block = desc.load([((r * S + s) * HALVES + half) * C + c, g * K + k])
    return block


@triton.jit
def _store_run(acc, y_ptrs, first, pixels, stride, K: tl.constexpr, WIDTH: tl.constexpr):
    """Store columns of a run from ``first`` on: t * K + k is channel k of pixel t of ``pixels``."""
    column = first + tl.arange(0, WIDTH)
    pixel = column // K
    offs_k = tl.max_contiguous(tl.multiple_of(column % K, 8), 8)
    ptrs = y_ptrs + (pixel * stride + offs_k)[None, :]
    tl.store(ptrs, acc.to(ptrs.dtype.element_ty), mask=(pixel < pixels)[None, :])


@triton.jit
def _find_run(index, n, N, W, P, Q, PAD_H: tl.constexpr, PAD_W: tl.constexpr, RUN: tl.constexpr):
    """Line and column of a run's first pixel, and its row of x under tap (0, 0), for image n."""
    BORDER: tl.constexpr = PAD_H if PAD_H > 0 else 0
    runs = (Q + RUN - 1) // RUN  # of a line
    run = tl.minimum(index, P * runs - 1)  # the last one again, where a program has fewer
    p = (run // runs + BORDER) % P  # lines that need every tap first
    q = run % runs * RUN
    return ((p, q, ((p - PAD_H) * W + q - PAD_W) * N + n),)


@triton.jit
def _load_x(
    desc, pixel, r, s, half, column, N, H, W, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    HALVES: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """The block of x under a tap of a pixel; zeros where that is outside, unless all are INSIDE."""
    p, q, first = pixel
    row = first + ((half * H + r) * W + s) * N
    if not INSIDE:
        h, w = p + r - PAD_H, q + s - PAD_W
        row = tl.where(h.to(tl.uint32) < H, row, HALVES * H * W * N)  # nor negative
        row = tl.where(w.to(tl.uint32) < W, row, HALVES * H * W * N)
    return (desc.load([row, column]),)


@triton.jit
def conv2d_relu_fwd_tma_kernel(
    x_desc,  # [H * W * N, G * C], in HALVES [2 * H * W * N, C]; blocks [BLOCK_M, BLOCK_K]
    w_desc,  # packed weight, blocks [BLOCK_K, BLOCK_N]
    w_tail_desc,  # the same in blocks [BLOCK_K, TAIL_N]
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
    INSIDE: tl.constexpr,  # every tap of every pixel lies in x
    RUNS: tl.constexpr,  # of a program: they share the weight
    RUN: tl.constexpr,  # pixels side by side that are columns of one product: they share x
    BLOCK_M: tl.constexpr,  # images; divides N
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,  # more output channels, in accumulators of their own: 192 = 128 + 64
    BLOCK_K: tl.constexpr,  # divides C
):
    wait_for_predecessor()
    N_BLOCKS: tl.constexpr = (RUN * K + BLOCK_N + TAIL_N - 1) // (BLOCK_N + TAIL_N)
    PARTS: tl.constexpr = 2 if TAIL_N > 0 else 1  # accumulators side by side
    pid = tl.program_id(0)
    g, half = group_and_half(tl.program_id(1), HALVES, REVERSE)
    k = pid % N_BLOCKS * (BLOCK_N + TAIL_N)
    n = pid // N_BLOCKS % (N // BLOCK_M) * BLOCK_M
    first = pid // N_BLOCKS // (N // BLOCK_M) * RUNS
    runs = ()
    accs = ()
    r_lo, r_hi, s_lo, s_hi = R, 0, S, 0
    for i in tl.static_range(RUNS):
        runs += _find_run(first + i, n, N, W, P, Q, PAD_H, PAD_W, RUN)
        accs += zeros(BLOCK_M, BLOCK_N, TAIL_N)
        lo, hi = tap_range(runs[i][0], runs[i][0], PAD_H, H, R)
        r_lo, r_hi = tl.minimum(r_lo, lo), tl.maximum(r_hi, hi)
        lo, hi = tap_range(runs[i][1], runs[i][1], PAD_W, W, S + RUN - 1)
        s_lo, s_hi = tl.minimum(s_lo, lo), tl.maximum(s_hi, hi)
    steps = tl.maximum(r_hi - r_lo, 0) * tl.maximum(s_hi - s_lo, 0) * (C // BLOCK_K)
    if not REVERSE:
        steps *= HALVES
    r = r_lo
    s = s_lo
    c = pid * 0
    for _ in range(steps):
        blocks = ()
        for i in tl.static_range(RUNS):
            blocks += _load_x(
                x_desc, runs[i], r, s, 0 if REVERSE else half, g * C + c, N, H, W, PAD_H, PAD_W,
                HALVES, INSIDE or RUNS == 1,  # a pixel alone takes no tap outside
            )  # fmt: skip
        b = _load_weight(w_desc, r, s, c, g, half, k, C, K, R, S, HALVES, REVERSE, BLOCK_N, BLOCK_K)
        b_tail = b
        if TAIL_N > 0:
            b_tail = _load_weight(
                w_tail_desc, r, s, c, g, half, k + BLOCK_N, C, K, R, S, HALVES, REVERSE, TAIL_N,
                BLOCK_K,
            )  # fmt: skip
        sums = ()
        for i in tl.static_range(RUNS):
            sums += add_products(accs, i * PARTS, blocks[i], b, b_tail, TAIL_N, "ieee")
        accs = sums
        r, s, c = next_tap(r, s, c, s_lo, s_hi, BLOCK_K, C)
        if HALVES > 1 and not REVERSE:
            r, half = next_half(r, half, r_lo, r_hi)

    for i in tl.static_range(RUNS):
        row = (runs[i][0] * Q + runs[i][1]) * N + n
        partials = sum_ptr + (row // BLOCK_M).to(tl.int64) * (G * K) + g * K
        if HALVES > 1 and REVERSE:
            partials += (row // BLOCK_M).to(tl.int64) * K + half * K
            row += half * P * Q * N
        offs = (row + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None] * (G * K) + g * K
        for j in tl.static_range(PARTS):
            if RUN > 1:
                _store_run(
                    accs[i * PARTS + j], y_ptr + offs, j * BLOCK_N, tl.minimum(RUN, Q - runs[i][1]),
                    N * (G * K), K, TAIL_N if j == 1 else BLOCK_N,
                )  # fmt: skip
            else:
                offs_n = k + j * BLOCK_N + tl.arange(0, TAIL_N if j == 1 else BLOCK_N)
                finish(
                    accs[i * PARTS + j], y_ptr, mask_ptr, partials, b_ptr, offs, offs_n,
                    (offs_n < K)[None, :], g, K, HAS_BIAS, RELU, MASK,
                )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _best_runs(name: str, runs: int, blocks: int, columns: int, most_sums: int) -> int:
    """How many runs of 128 images a program takes, so that the last one ends first.

    A program takes as long as its products, or as its share of what all of them load from L2.
    """
    processors = PROCESSORS.get(name, 128)

    def end(share: int) -> float:
        programs, rows = -(-runs // share) * blocks, 128 * share
        loads = _ROW_CYCLES * programs * (rows + columns) / processors
        return max(loads, -(-programs // processors) * rows * columns / 128)

    return min((n for n in (1, 2, 3) if 128 * n * columns <= most_sums), key=end, default=1)


def pixel_tile(
    own: Tile, x: Tensor, name: str, sizes: tuple[int, ...], masked: bool, most_run: int
) -> dict[str, int] | None:
    """Blocks for ``sizes``: images, rows and columns of the output, channels of a group, ...

    Args:
        own: the tile of one pixel. A tile's BLOCK_M is the images of all that share the weight.
        x: [H, W, N, G * C] or halves, of C that 16 divides.
        name: of the kernel.
        sizes: N, P, Q, C, K, ..., groups.
        masked: whether the sums are masked.
        most_run: neighbours that can be columns of one product.

    Returns:
        None where a tile is not of whole pixels.
    """
    (N, P, Q, C, K), groups = sizes[:5], sizes[-1]

    def split(block: int) -> tuple[int, int, int]:
        """Pixels of a run, and its columns in one block or two."""
        run = max(1, min(block // K, most_run))
        n, tail = split_channels(block, run * K, max(16, block // 2))
        # Products of 32 columns would read more shared memory than there is time for.
        return (run, n, tail) if tail != 32 else (run, cut(block, run * K), 0)

    if N % 128 == 0:
        k, (run, n, tail_n) = math.gcd(own[2], C), split(own[1])
        columns, most = n + tail_n, _MOST_MASKED_SUMS if masked else _MOST_SUMS
        blocks = N // 128 * groups * -(-run * K // columns)
        share = _best_runs(target(x.device), P * -(-Q // run), blocks, columns, most)
        if P * Q * (N // 128) * groups * -(-K // 64) <= PROCESSORS.get(target(x.device), 128):
            own = (own[0], min(own[1], 64), *own[2:])  # all narrow blocks of a pixel start at once
        elif share > 1:
            stages = min(8, _STAGES_BYTES // (2 * k * (128 * share + columns)))
            own = (128 * share, own[1], k, own[3] if columns > 64 else 4, stages)
    block_m, block_n, block_k, warps, stages = tuned(own, x, name, *sizes)
    block_m = cut(block_m, P * Q * N)
    images = math.gcd(block_m & -block_m, N)
    if images < 128 and images != block_m:
        return None
    run, n, tail_n = split(block_n)
    return {
        "RUNS": block_m // images, "RUN": run, "BLOCK_M": images, "BLOCK_N": n, "TAIL_N": tail_n,
        "BLOCK_K": math.gcd(block_k, C), "num_stages": stages,
        "num_warps": halved_warps(warps, block_m, n + tail_n, 16),
    }  # fmt: skip


def descriptors(
    x: Tensor, w: Tensor, tile: dict[str, int], reverse: bool
) -> tuple[TensorDescriptor, ...]:
    """x, and w in main blocks and in tail blocks (the main ones again where there is none)."""
    n, k = tile["BLOCK_N"], tile["BLOCK_K"]
    R, S, rows, columns = w.shape
    weights = w.view(R, S * rows, columns) if reverse else w.view(-1, columns)
    blocks = [[1, b, k] if reverse else [k, b] for b in (n, tile["TAIL_N"] or n)]
    return (
        TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), [tile["BLOCK_M"], k]),
        *(TensorDescriptor.from_tensor(weights, block) for block in blocks),
    )
