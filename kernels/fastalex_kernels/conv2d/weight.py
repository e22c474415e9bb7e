"""The weight gradient of a convolution at stride 1.

    dw[r, s, c, k] = sum over p, q, n of x[p + r - top, q + s - left, n, c] dz[p, q, n, k]

x, dz and the gradient are HWNC, as in conv2d_relu. A program takes a block of channels of one tap,
or of all taps of a line, and adds up a share of the rows (p, q, n): contiguous runs in both
operands, for which a tap lies inside the image, so nothing is gathered. What decides its speed is
how many rows of x and dz it has to fetch for its products:

* 192 channels are taken as 128 + 64, in accumulators of their own, and nothing is padded.
* 48 input channels, padded to 64, would make a narrow tile. There the taps of a line share each
  block of dz: three or five tiles of x against one of dz. At the left and right border some of
  them are outside of the image; they read zeros, which costs no traffic.
* Where the taps of a line by 48 channels would fill a block, as 5 x 48 do, x is copied into lines
  [H, G, N, W, C]: there they are contiguous columns. Beyond a line's ends zeros are read.
* The rows are split into as many parts as end first, for a part has to be stored and summed too.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common.arguments import aligned
from ..common.backend import has_tma, target
from ..common.dependent import wait_for_predecessor
from ..common.launch import launch
from ..common.tuned import PROCESSORS, cut, dot_precision, tile_entry, tuned
from ..conv2d.arguments import Padding
from ..conv2d.tiles import (
    add_products,
    group_and_half,
    halved_warps,
    row_blocks,
    split_channels,
    tma_fits,
    zeros,
)

# The weight gradient's M is input channels, its K is rows.
_WEIGHT_TILES = {
    ("sm_80", 16): (64, 64, 64, 4, 3),
    ("sm_90", 16): (128, 256, 64, 8, 3),
    ("sm_100", 16): (128, 128, 64, 8, 4),
    ("gfx942", 16): (64, 64, 32, 4, 2),
    ("other", 16): (64, 64, 32, 4, 3),  # 8 warps would make each product of 64 rows twice
    ("other", "tf32"): (128, 64, 32, 4, 3),
    ("sm_90", "tf32"): (128, 128, 32, 8, 3),
    ("other", 32): (64, 64, 32, 8, 3),
    "interpreter": (2048, 512, 512, 4, 1),
}
_LINES_TILES = {
    ("sm_80", 16): (256, 128, 64, 8, 3),
    ("sm_90", 16): (256, 128, 64, 8, 4),
    ("sm_100", 16): (256, 128, 64, 8, 4),
    ("other", 16): (256, 128, 32, 8, 3),
}
_PACKED = 512  # chunks of 8 channels of a program that packs lines
_MOST_SUMS = 5 * 64 * 128  # that a program of 8 warps holds: 160 registers a thread
_MOST_SUMS_OF_4_WARPS = 3 * 64 * 128  # 192 registers
# The reduction is split over programs, of which one runs on a processor.
_PART_STEPS = 16  # what a part costs to store and to sum, in steps of 64 rows


@triton.jit
def _weight_share(
    r, s, split, N, H, W, P, Q, PAD_H: tl.constexpr, PAD_W: tl.constexpr, TAPS: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What one program of the weight gradient adds up.

    The output pixels for which one of the taps (r, s) .. (r, s + TAPS - 1) lies inside the image
    are p_lo..p_hi by q_lo..q_hi: `run` rows in each line of them, contiguous both in dz and,
    shifted, in x. Returned are the blocks first..last of this split, the line p and row j of the
    first, q_lo, q_hi and run.
    """
    p_lo = tl.maximum(PAD_H - r, 0)
    p_hi = tl.minimum(H + PAD_H - r, P)
    q_lo = tl.maximum(PAD_W - (s + TAPS - 1), 0)
    q_hi = tl.minimum(W + PAD_W - s, Q)
    run = tl.maximum(q_hi - q_lo, 0) * N
    blocks = (run + BLOCK_K - 1) // BLOCK_K
    steps = tl.maximum(p_hi - p_lo, 0) * blocks
    share = (steps + SPLIT - 1) // SPLIT
    first = split * share
    last = tl.minimum(first + share, steps)
    p = p_lo + first // tl.maximum(blocks, 1)
    return first, last, p, first % tl.maximum(blocks, 1) * BLOCK_K, q_lo, q_hi, run


@triton.jit
def _first_rows(
    ptr, column, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Addresses of the first BLOCK_K rows, from ``column`` on, of a matrix with rows of WIDTH."""
    k = tl.arange(0, BLOCK_K) * WIDTH
    c = column + tl.arange(0, BLOCK)
    return ptr + (k[None, :] + c[:, None] if TRANSPOSED else k[:, None] + c[None, :])


@triton.jit
def _load_rows(
    rows, row, column, count, columns, WIDTH: tl.constexpr, FULL: tl.constexpr,
    TMA: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """[BLOCK_K, BLOCK] of a matrix with rows of WIDTH, from (row, column) on, or its transpose.

    ``rows`` is its descriptor, or the addresses of its first block in these columns. What lies
    beyond ``count`` rows and ``columns`` columns is 0, unless the block is FULL.
    """
    if TMA:
        block = rows.load([row, column])
        if TRANSPOSED:
            block = block.T
    else:
        ptrs = rows + row.to(tl.int64) * WIDTH
        if FULL:
            block = tl.load(ptrs)
        else:
            k = tl.arange(0, BLOCK_K) < count
            c = tl.arange(0, BLOCK) < columns
            mask = k[None, :] & c[:, None] if TRANSPOSED else k[:, None] & c[None, :]
            block = tl.load(ptrs, mask=mask, other=0.0)
    return block


@triton.jit
def _store_part(acc, ptr, rows, columns, WIDTH: tl.constexpr):
    """A block of the gradient, of which ``rows`` by ``columns`` exist."""
    m = tl.arange(0, acc.shape[0])
    n = tl.arange(0, acc.shape[1])
    mask = (m < rows)[:, None] & (n < columns)[None, :]
    tl.store(ptr + (m[:, None] * WIDTH + n[None, :]), acc, mask=mask)


@triton.jit
def _conv2d_bwd_weight_kernel(
    x_ptr,  # [H, W, N, G * C] or [2, H, W, N, C]; with TMA its descriptor [BLOCK_K, BLOCK_M]
    x_tail_ptr,  # the same in blocks [BLOCK_K, TAIL_M]
    dz_ptr,  # [P, Q, N, G * K], with TMA its descriptor in blocks [BLOCK_K, BLOCK_N]
    dz_tail_ptr,  # the same in blocks [BLOCK_K, TAIL_N]
    part_ptr,  # float32 [SPLIT, R * S, HALVES * C, G * K]
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
    HALVES: tl.constexpr,  # 2: the channels of x are those of two tensors, G is 1
    SPLIT: tl.constexpr,
    EVEN_ROWS: tl.constexpr,  # BLOCK_K divides N: every block of rows is full, and of one pixel
    BORDER: tl.constexpr,  # of a program's taps some may be outside of the image; EVEN_ROWS holds
    TMA: tl.constexpr,  # EVEN_ROWS holds
    PRECISION: tl.constexpr,
    TAPS: tl.constexpr,  # of one line, in a program: they share dz
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,  # more input channels, in accumulators of their own; TAPS is 1
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,  # more output channels
    BLOCK_K: tl.constexpr,
):
    wait_for_predecessor()
    M_BLOCKS: tl.constexpr = (C + BLOCK_M + TAIL_M - 1) // (BLOCK_M + TAIL_M)
    N_BLOCKS: tl.constexpr = (K + BLOCK_N + TAIL_N - 1) // (BLOCK_N + TAIL_N)
    FULL_M: tl.constexpr = EVEN_ROWS and not BORDER and C % (BLOCK_M + TAIL_M) == 0
    FULL_N: tl.constexpr = EVEN_ROWS and K % (BLOCK_N + TAIL_N) == 0
    PARTS: tl.constexpr = 2 if TAIL_N > 0 else 1  # accumulators side by side
    pid = tl.program_id(0)
    split = tl.program_id(1)
    g, half = group_and_half(tl.program_id(2), HALVES, True)
    tap = pid // (M_BLOCKS * N_BLOCKS) * TAPS
    r = tap // S
    s = tap % S
    c = pid // N_BLOCKS % M_BLOCKS * (BLOCK_M + TAIL_M)
    k = pid % N_BLOCKS * (BLOCK_N + TAIL_N)
    first, last, p, j, q_lo, q_hi, run = _weight_share(
        r, s, split, N, H, W, P, Q, PAD_H, PAD_W, TAPS, SPLIT, BLOCK_K
    )
    q = q_lo
    if BORDER:  # pixel by pixel
        q += j // N
        j = j % N
        run = N
    accs = zeros(BLOCK_M, BLOCK_N, TAIL_N)
    for _ in tl.static_range(1, TAPS):
        accs += zeros(BLOCK_M, BLOCK_N, TAIL_N)
    if TAIL_M > 0:
        accs += zeros(TAIL_M, BLOCK_N, TAIL_N)
    x_column = g * C + c
    dz_column = g * K + k
    if not TMA:
        x_ptr = _first_rows(x_ptr, x_column, G * C, BLOCK_K, BLOCK_M, True)
        dz_ptr = _first_rows(dz_ptr, dz_column, G * K, BLOCK_K, BLOCK_N, False)
        if TAIL_M > 0:
            x_tail_ptr = _first_rows(x_tail_ptr, x_column + BLOCK_M, G * C, BLOCK_K, TAIL_M, True)
        if TAIL_N > 0:
            dz_tail_ptr = _first_rows(
                dz_tail_ptr, dz_column + BLOCK_N, G * K, BLOCK_K, TAIL_N, False
            )

    for _ in range(first, last):
        count = run - j
        row = (p * Q + q) * N + j
        b = _load_rows(
            dz_ptr, row, dz_column, count, K - k, G * K, FULL_N, TMA, BLOCK_K, BLOCK_N, False
        )
        b_tail = b
        if TAIL_N > 0:
            b_tail = _load_rows(
                dz_tail_ptr, row, dz_column + BLOCK_N, count, K - k - BLOCK_N, G * K, FULL_N, TMA,
                BLOCK_K, TAIL_N, False,
            )  # fmt: skip
        w = q + s - PAD_W
        row = ((half * H + p + r - PAD_H) * W + w) * N + j
        sums = ()
        for i in tl.static_range(TAPS):
            x_row = row + i * N
            if BORDER:
                inside = (w + i).to(tl.uint32) < W  # nor negative
                x_row = tl.where(inside, x_row, HALVES * H * W * N)  # where TMA reads zeros
                count = tl.where(inside, run - j, 0)
            a = _load_rows(
                x_ptr, x_row, x_column, count, C - c, G * C, FULL_M, TMA, BLOCK_K, BLOCK_M, True
            )
            sums += add_products(accs, i * PARTS, a, b, b_tail, TAIL_N, PRECISION)
        if TAIL_M > 0:
            a = _load_rows(
                x_tail_ptr, row, x_column + BLOCK_M, count, C - c - BLOCK_M, G * C, FULL_M, TMA,
                BLOCK_K, TAIL_M, True,
            )  # fmt: skip
            sums += add_products(accs, PARTS, a, b, b_tail, TAIL_N, PRECISION)
        accs = sums
        j += BLOCK_K
        wrap = j >= run
        j = tl.where(wrap, 0, j)
        if BORDER:
            q = tl.where(wrap, q + 1, q)
            wrap = q == q_hi
            q = tl.where(wrap, q_lo, q)
        p = tl.where(wrap, p + 1, p)

    row = (((split * (R * S) + tap) * HALVES + half) * C + c).to(tl.int64)
    ptr = part_ptr + (row * (G * K) + dz_column)
    for i in tl.static_range(TAPS):
        _store_part(accs[i * PARTS], ptr, C - c, K - k, G * K)
        if TAIL_N > 0:
            _store_part(accs[i * PARTS + 1], ptr + BLOCK_N, C - c, K - k - BLOCK_N, G * K)
        ptr += HALVES * C * (G * K)
    if TAIL_M > 0:
        ptr += (BLOCK_M - HALVES * C) * (G * K)
        _store_part(accs[PARTS], ptr, C - c - BLOCK_M, K - k, G * K)
        if TAIL_N > 0:
            tail_columns = K - k - BLOCK_N
            _store_part(accs[PARTS + 1], ptr + BLOCK_N, C - c - BLOCK_M, tail_columns, G * K)


@triton.jit
def _conv2d_bwd_weight_lines_kernel(
    x_ptr,  # [H * G * N, W * C], with TMA its descriptor in blocks [BLOCK_K, BLOCK_M]
    dz_ptr,  # [P * Q * N, G * K], with TMA its descriptor in blocks [BLOCK_K, BLOCK_N]
    part_ptr,  # float32 [SPLIT, R, S * C, G * K]
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
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides N
):
    wait_for_predecessor()
    M_BLOCKS: tl.constexpr = (S * C + BLOCK_M - 1) // BLOCK_M
    N_BLOCKS: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    split = tl.program_id(1)
    g = tl.program_id(2)
    r = pid // (M_BLOCKS * N_BLOCKS)
    c = pid // N_BLOCKS % M_BLOCKS * BLOCK_M
    k = pid % N_BLOCKS * BLOCK_N
    first, last, p, j, q_lo, q_hi, _ = _weight_share(
        r, 0, split, N, H, W, P, Q, PAD_H, PAD_W, S, SPLIT, BLOCK_K
    )
    q = q_lo + j // N
    n = j % N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    offs_m = tl.arange(0, BLOCK_M)
    if not TMA:
        x_ptr += offs_m[:, None] + tl.arange(0, BLOCK_K)[None, :] * (W * C)
        dz_ptr = _first_rows(dz_ptr, g * K + k, G * K, BLOCK_K, BLOCK_N, False)
    for _ in range(first, last):
        row = ((p + r - PAD_H) * G + g) * N + n
        column = (q - PAD_W) * C + c  # taps before a line's first pixel, or after its last, are 0
        if TMA:
            a = x_ptr.load([row, column])
        else:
            inside = (column + offs_m >= 0) & (column + offs_m < W * C)
            a = tl.load(x_ptr + (row.to(tl.int64) * (W * C) + column), inside[:, None], other=0.0)
        b = _load_rows(
            dz_ptr, (p * Q + q) * N + n, g * K + k, BLOCK_K, K - k, G * K, K % BLOCK_N == 0, TMA,
            BLOCK_K, BLOCK_N, False,
        )  # fmt: skip
        acc = tl.dot(a.T if TMA else a, b, acc)
        n += BLOCK_K
        wrap = n == N
        n = tl.where(wrap, 0, n)
        q = tl.where(wrap, q + 1, q)
        wrap = q == q_hi
        q = tl.where(wrap, q_lo, q)
        p = tl.where(wrap, p + 1, p)
    row = ((split * R + r) * (S * C) + c).to(tl.int64)
    _store_part(acc, part_ptr + row * (G * K) + (g * K + k), S * C - c, K - k, G * K)


@triton.jit
def _pack_lines_kernel(
    x_ptr,  # [H, W, N, G * C]
    lines_ptr,  # [H, G, N, W, C]
    N,
    W,
    G: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,  # chunks of 8 channels of a program
):
    wait_for_predecessor()
    CHUNKS: tl.constexpr = C // 8
    count = N * W * CHUNKS  # of a line of all images
    blocks = (count + T - 1) // T
    line = tl.program_id(0) // blocks
    chunk = tl.program_id(0) % blocks * T + tl.arange(0, T)
    pixel = chunk // CHUNKS
    row = (line // G * W + pixel % W) * N + pixel // W
    column = line % G * C + chunk % CHUNKS * 8
    lane = tl.arange(0, 8)[None, :]
    mask = (chunk < count)[:, None]
    values = tl.load(
        x_ptr + row.to(tl.int64)[:, None] * (G * C) + column[:, None] + lane, mask=mask
    )
    out = line.to(tl.int64) * count + chunk
    tl.store(lines_ptr + out[:, None] * 8 + lane, values, mask=mask)


@functools.lru_cache(maxsize=1024)
def _best_split(name: str, programs: int, steps: int) -> int:
    """In how many parts a reduction of ``steps`` ends first on the target ``name``."""
    if name == "interpreter":
        return 1
    processors = PROCESSORS.get(name, 128)

    def last_end(split: int) -> int:
        rounds = -(-programs * split // processors)
        return rounds * (-(-steps // split) + _PART_STEPS)

    most = max(1, min(4 * processors // programs, steps // 4))
    return min(range(1, most + 1), key=last_end)


def _weight_tile(
    x: Tensor, blocks: tuple[int, int, int], C: int, K: int, S: int, pads: tuple[int, int]
) -> dict[str, int]:
    """What a program holds of [S taps, C, K], cut to the layer.

    Few input channels would leave the tile narrow, so there the taps of a line share it; where the
    line has borders, that needs blocks of rows of one pixel.
    """
    block_m, block_n, block_k = blocks
    m, tail_m = split_channels(block_m, C, min(block_m, 128))
    n, tail_n = split_channels(block_n, K, min(block_n, 128))
    taps = 1
    one_pixel = x.shape[-2] > 0 and x.shape[-2] % block_k == 0
    fits = not tail_m and S <= 5 and S * m * (n + tail_n) <= _MOST_SUMS
    if m <= 64 and fits and (one_pixel or not any(pads)) and x.element_size() == 2:
        taps = S  # in float32 they spill
    if target(x.device) == "sm_80" and (tail_n or taps > 3):
        block_k = min(block_k, 32)  # 64 spill
    return {
        "TAPS": taps, "BORDER": taps > 1 and any(pads), "BLOCK_M": m, "TAIL_M": tail_m,
        "BLOCK_N": n, "TAIL_N": tail_n, "BLOCK_K": block_k,
    }  # fmt: skip


def _in_chunks(x: Tensor, groups: int) -> bool:
    """Whether a group's channels of a pixel are chunks of 16 bytes, on a GPU of NVIDIA's."""
    chunks = x.element_size() == 2 and x.shape[3] // groups % 8 == 0 and aligned(x)
    return chunks and x.numel() > 0 and target(x.device).startswith("sm_")


def pack_lines(x: Tensor, kernel_size: tuple[int, int], groups: int) -> Tensor | None:
    """x [H, W, N, G*C] as [H, G, N, W, C], where the weight gradient is faster by that."""
    if x.dim() > 4:  # halves
        return None
    (H, W, N, GC), (R, S) = x.shape, kernel_size
    C = GC // groups
    block = triton.next_power_of_2(S * C)
    filled = 128 <= block <= 256 and S * C / block >= 0.875
    if R < 3 or C >= 64 or not filled or N % 64 or not _in_chunks(x, groups):
        return None
    lines = x.new_empty((H, groups, N, W, C))
    programs = H * groups * triton.cdiv(N * W * C // 8, _PACKED)
    launch(
        _pack_lines_kernel, (programs,), x, lines, N, W, G=groups, C=C, T=_PACKED, num_warps=4,
        counted=max(H * W * N, N * W * C // 8),
    )  # fmt: skip
    return lines


def _backward_weight_of_lines(
    lines: Tensor, dz: Tensor, kernel_size: tuple[int, int], padding: Padding
) -> Tensor:
    """``conv2d_relu_backward_weight`` of x [H, G, N, W, C]."""
    (H, groups, N, W, C), (P, Q, _, GK), (R, S) = lines.shape, dz.shape, kernel_size
    K = GK // groups
    m, n, k, warps, stages = tile_entry(
        _LINES_TILES, lines, "conv2d weight", N, P, Q, C, K, R, S, groups
    )
    m, n, k = cut(m, S * C), cut(n, K), math.gcd(k, N)
    programs = R * triton.cdiv(S * C, m) * triton.cdiv(K, n)
    split = _split(lines, (N, P, Q, C, K, R, S, groups), programs, P * Q * N // k)
    part = lines.new_empty((split, R, S, C, GK), dtype=torch.float32)
    tma, operands = has_tma(lines.device), [lines.view(-1, W * C), dz.view(-1, GK)]
    if tma:
        operands = list(map(TensorDescriptor.from_tensor, operands, ([k, m], [k, n])))
    launch(
        _conv2d_bwd_weight_lines_kernel, (programs, split, groups), *operands, part,
        N, H, W, P, Q, G=groups, C=C, K=K, R=R, S=S, PAD_H=padding[0][0], PAD_W=padding[1][0],
        SPLIT=split, TMA=tma, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k,
        num_stages=stages, num_warps=halved_warps(warps, m, n, 16),
        counted=max(H * groups * N, P * Q * N, k * W * C, part[..., 0].numel()),
    )  # fmt: skip
    return part


def _split(x: Tensor, sizes: tuple[int, ...], programs: int, steps: int) -> int:
    """In how many parts a reduction of ``steps`` is split, for so many ``programs`` of a group."""
    own = (_best_split(target(x.device), programs * sizes[-1], steps),)
    return tuned(own, x, "conv2d weight parts", *sizes, programs, steps)[0]


def conv2d_relu_backward_weight(
    x: Tensor,
    dz: Tensor,
    kernel_size: tuple[int, int],
    padding: Padding,
    groups: int,
    lines: Tensor | None = None,
) -> Tensor:
    """dw in float32 parts [parts, R, S, C, G*K], of x [H, W, N, G*C] and dz [P, Q, N, G*K].

    Of an x in halves, [2, H, W, N, C / 2], there is one group. ``lines`` is what ``pack_lines``
    made of x, where that was done before.
    """
    if _in_chunks(dz, groups):
        lines = pack_lines(x, kernel_size, groups) if lines is None else lines
        if lines is not None:
            return _backward_weight_of_lines(lines, dz, kernel_size, padding)
    (H, W, N, GC), (P, Q, _, GK), (R, S) = x.shape[-4:], dz.shape, kernel_size
    C, K, halves = GC // groups, GK // groups, len(x) if x.dim() > 4 else 1
    axis = halves * groups  # of programs with other inputs
    block_m, block_n, block_k, warps, stages = tile_entry(
        _WEIGHT_TILES, x, "conv2d weight", N, P, Q, C, K, R, S, axis
    )
    block_k = next((k for k in (block_k, block_k // 2) if N % k == 0), block_k)
    tile = _weight_tile(x, (block_m, block_n, block_k), C, K, S, padding[1])
    block_k = tile["BLOCK_K"]
    even_rows = N % block_k == 0
    rows, columns = tile["BLOCK_M"] + tile["TAIL_M"], tile["BLOCK_N"] + tile["TAIL_N"]
    sums, bits = tile["TAPS"] * rows * columns, 8 * x.element_size()
    if bits == 16 and sums <= _MOST_SUMS_OF_4_WARPS and 64 in (tile["BLOCK_M"], tile["TAIL_M"]):
        warps = min(warps, 4)  # 8 would read 64 rows of x twice
    programs = R * S // tile["TAPS"] * triton.cdiv(C, rows) * triton.cdiv(K, columns)
    steps = P * triton.cdiv(Q * N, block_k)
    split = _split(x, (N, P, Q, C, K, R, S, axis), programs, steps)
    part = x.new_empty((split, R, S, halves * C, GK), dtype=torch.float32)
    tma = even_rows and N > 0 and tma_fits(groups, x, dz)
    operands: tuple[Any, ...] = (x, x, dz, dz)
    if tma:
        operands = (
            *row_blocks(x, block_k, tile["BLOCK_M"], tile["TAIL_M"]),
            *row_blocks(dz, block_k, tile["BLOCK_N"], tile["TAIL_N"]),
        )
    launch(
        _conv2d_bwd_weight_kernel, (programs, split, axis), *operands, part, N, H, W, P, Q,
        G=groups, C=C, K=K, R=R, S=S, PAD_H=padding[0][0], PAD_W=padding[1][0], HALVES=halves,
        SPLIT=split, EVEN_ROWS=even_rows, TMA=tma, PRECISION=dot_precision(x, "conv2d weight"),
        **tile, num_stages=stages,
        num_warps=halved_warps(warps, tile["TAPS"] * rows, columns, bits),
        counted=max(halves * H * W * N, P * Q * N, part[..., 0].numel()),
    )  # fmt: skip
    return part
