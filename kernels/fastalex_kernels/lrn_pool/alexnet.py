"""LRN + max-pool for the sizes of AlexNet: a window of 5 channels, pooling 3 x 3 with stride 2.

Such a kernel moves few bytes and is bound by the instructions it issues, so the work is arranged
to compute no normalised value twice and to shuffle nothing:

* A thread takes a chunk: 8 neighbouring channels of one image, one 16-byte load. The window of a
  channel reaches 2 further on either side, two 4-byte loads. The sums of squares are a tree in
  registers.
* A program takes a strip of 5 or 7 columns, which hold 2 or 3 pooled ones, and goes down its rows:
  the bottom row of one window is kept as the top row of the next.
* The maximum and its position are found at once. A float32's bits are turned into an integer of
  the same order, and its 4 lowest bits, 2^-20 of the value, are replaced by 15 - position: one
  integer maximum does both, and of equals the first wins. Positions beyond the border repeat the
  last row or column, which never changes a maximum nor wins a tie.
* With s = alpha / size, d = s (k / s + sum of squares). The sums start at k / s, and the factor
  s^-0.75 is applied to the few values that are stored.

Backward, a program takes the two columns that belong to one pooled column and goes down likewise.
A channel's gradient needs its neighbours' too, so 2 values cross between the chunks of a group on
either side, through shared memory.

Layout HWNC: a pixel is N * C contiguous values, cut into N * C / 8 chunks.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.arguments import aligned
from ..common.backend import target
from ..common.blocks import join8
from ..common.dependent import wait_for_predecessor
from ..common.launch import MOST_COUNTED, launch
from ..common.parameters import Norm, Window
from ..common.tuned import PROCESSORS, tuned

Split = TypeVar("Split")

CHUNK = 8  # channels
# What a program holds unless a table of ``fastalex.tune`` says otherwise.
_CHUNKS = 128  # one a thread: 4 warps
_RESIDENT = {3: 4, 2: 6}  # forward programs of so many columns that a processor holds
_LEAST = 3  # programs of a processor that hide each other's loads


def fits(x: Tensor, norm: Norm, groups: int, window: Window) -> bool:
    """Whether these kernels can do LRN + pooling of x [H, W, N, G*C]."""
    channels = x.shape[3] // groups
    return (
        norm.size == 5
        and norm.beta == 0.75
        # The sums start at k / s, and the results are s^-0.75 times too small: both, and the
        # products of the backward pass, stay far inside float32's range.
        and 1e-12 < norm.scale < 1e6
        and 1e-12 < norm.offset / norm.scale < 1e18
        and window == (3, 2)
        and x.element_size() == 2
        and aligned(x)
        and channels % CHUNK == 0
        and channels // CHUNK <= _CHUNKS
        and x.shape[2] * x.shape[3] <= MOST_COUNTED  # values of a pixel are counted in 32 bits
        # The interpreter takes fewer steps through the general kernel, and AMD's compiler needs
        # over a minute for the straight line of code here.
        and target(x.device).startswith("sm_")
    )


@triton.jit
def _split8(v, T: tl.constexpr):
    """The 8 columns of v [T, 8]."""
    even, odd = tl.split(tl.reshape(v, [T, 4, 2]))
    v04, v26 = tl.split(tl.reshape(even, [T, 2, 2]))
    v15, v37 = tl.split(tl.reshape(odd, [T, 2, 2]))
    v0, v4 = tl.split(v04)
    v2, v6 = tl.split(v26)
    v1, v5 = tl.split(v15)
    v3, v7 = tl.split(v37)
    return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def _halves(word):
    """The two bfloat16 of an int32 as float32: one instruction each, where a cast takes two."""
    low = (word << 16).to(tl.float32, bitcast=True)
    return low, (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _load8(x_ptr, chunk, mask, EVEN: tl.constexpr, T: tl.constexpr):
    """The 8 values of each chunk in float32."""
    if x_ptr.dtype.element_ty == tl.bfloat16:
        word_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        ptrs = word_ptr + chunk[:, None] * 4 + tl.arange(0, 4)[None, :]
        words = tl.load(ptrs) if EVEN else tl.load(ptrs, mask=mask[:, None], other=0)
        w02, w13 = tl.split(tl.reshape(words, [T, 2, 2]))
        w0, w2 = tl.split(w02)
        w1, w3 = tl.split(w13)
        a0, a1 = _halves(w0)
        a2, a3 = _halves(w1)
        a4, a5 = _halves(w2)
        a6, a7 = _halves(w3)
    else:
        ptrs = x_ptr + chunk[:, None] * 8 + tl.arange(0, 8)[None, :]
        values = tl.load(ptrs) if EVEN else tl.load(ptrs, mask=mask[:, None], other=0.0)
        a0, a1, a2, a3, a4, a5, a6, a7 = _split8(values.to(tl.float32), T)
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def _load2(x_ptr, chunk, PAIR: tl.constexpr, mask):
    """The two values of a pair, counted from each chunk's first, in float32; 0 where masked."""
    if x_ptr.dtype.element_ty == tl.bfloat16:
        word_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        a0, a1 = _halves(tl.load(word_ptr + chunk * 4 + PAIR, mask=mask, other=0))
    else:
        ptrs = x_ptr + (chunk * 8 + 2 * PAIR)[:, None] + tl.arange(0, 2)[None, :]
        a0, a1 = tl.split(tl.load(ptrs, mask=mask[:, None], other=0.0).to(tl.float32))
    return a0, a1


@triton.jit
def _denominators(x_ptr, chunks, START: tl.constexpr, EVEN: tl.constexpr, T: tl.constexpr):
    """The 8 values of each chunk, and START + the sum of squares in the window of each of them.

    ``chunks`` are their numbers, and whether they and their neighbours on either side are there.
    Every window is two neighbouring pairs of channels and one more, so it is enough to start
    every other pair at START.
    """
    chunk, mask, left, right = chunks
    a0, a1, a2, a3, a4, a5, a6, a7 = _load8(x_ptr, chunk, mask, EVEN, T)
    b0, b1 = _load2(x_ptr, chunk, -1, left)
    c0, c1 = _load2(x_ptr, chunk, 4, right)
    s01 = a0 * a0 + START + a1 * a1
    s23 = a2 * a2 + a3 * a3
    s45 = a4 * a4 + START + a5 * a5
    s67 = a6 * a6 + a7 * a7
    s0123, s2345, s4567 = s01 + s23, s23 + s45, s45 + s67
    d0 = (b0 * b0 + b1 * b1) + s01 + a2 * a2
    d1 = s0123 + b1 * b1
    d2 = s0123 + a4 * a4
    d3 = s2345 + a1 * a1
    d4 = s2345 + a6 * a6
    d5 = s4567 + a3 * a3
    d6 = s4567 + c0 * c0
    d7 = s67 + (c0 * c0 + START + c1 * c1) + a5 * a5
    return (a0, a1, a2, a3, a4, a5, a6, a7), (d0, d1, d2, d3, d4, d5, d6, d7)


@triton.jit
def _key(a, d, SIGNED: tl.constexpr):
    """a d^-0.75 as an integer of the same order; without SIGNED, for a of at least 0."""
    root = tl.math.rsqrt(d)
    bits = (a * (root * tl.sqrt(root))).to(tl.int32, bitcast=True)
    if SIGNED:
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits


@triton.jit
def _column_keys(
    x_ptr, chunks, START: tl.constexpr, SIGNED: tl.constexpr, EVEN: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    a, d = _denominators(x_ptr, chunks, START, EVEN, T)
    keys = ()
    for i in tl.static_range(8):
        keys += (_key(a[i], d[i], SIGNED),)  # type: ignore[assignment]
    return join8(keys, T)


@triton.jit
def _max3(k0, k1, k2, first):
    """The largest of three columns' keys, their low bits first, first - 1 and first - 2."""
    return tl.maximum(
        tl.maximum((k0 & -16) | first, (k1 & -16) | (first - 1)), (k2 & -16) | (first - 2)
    )


@triton.jit
def _row_keys(
    x_ptr, h, w, W, pixel, chunks, first,
    START: tl.constexpr, SIGNED: tl.constexpr, EVEN: tl.constexpr, T: tl.constexpr,
    STRIP: tl.constexpr,
):  # fmt: skip
    """The maxima over 3 columns, at the STRIP pooled columns that start at column w of row h.

    The low bits of a first column are ``first``.
    """
    row = x_ptr + (h * W).to(tl.int64) * pixel
    x_ptr = row + w * pixel
    keys = (_column_keys(x_ptr, chunks, START, SIGNED, EVEN, T),)
    for i in tl.static_range(1, 2 * STRIP + 1):
        x_ptr = row + tl.minimum(w + i, W - 1) * pixel
        keys += (_column_keys(x_ptr, chunks, START, SIGNED, EVEN, T),)  # type: ignore[assignment]
    maxima = ()
    for i in tl.static_range(STRIP):
        maxima += (_max3(keys[2 * i], keys[2 * i + 1], keys[2 * i + 2], first),)  # type: ignore[assignment]
    return maxima


@triton.jit
def _store_maximum(
    y_ptr, argmax_ptr, offs, mask, key, save, UNIT: tl.constexpr, SIGNED: tl.constexpr
):  # fmt: skip
    bits = key & -16
    if SIGNED:
        bits = bits ^ ((bits >> 31) & 0x7FFFFFF0)
    y = bits.to(tl.float32, bitcast=True) * UNIT
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask[:, None])
    if save != 0:
        tl.store(argmax_ptr + offs, (~key & 15).to(tl.uint8), mask=mask[:, None])


@triton.jit(do_not_specialize=["save"])
def _lrn_max_pool2d_chunks_fwd_kernel(
    x_ptr,  # [H, W, N, C]
    y_ptr,  # [P, Q, N, C]
    argmax_ptr,  # uint8 [P, Q, N, C], written where save is not 0
    N,
    H,
    W,
    P,
    Q,
    rows_per_program,
    save,
    C: tl.constexpr,
    GROUP: tl.constexpr,  # chunks of a group of channels
    START: tl.constexpr,
    UNIT: tl.constexpr,
    SIGNED: tl.constexpr,
    EVEN: tl.constexpr,  # every program is full: only the borders of groups are masked
    T: tl.constexpr,
    STRIP: tl.constexpr,  # pooled columns of a program
):
    wait_for_predecessor()
    count = N * (C // 8)
    chunk = tl.program_id(0) * T + tl.arange(0, T)
    mask = chunk < count
    place = chunk % GROUP
    chunks = (chunk, mask, mask & (place != 0), mask & (place != GROUP - 1))
    q = tl.program_id(1) * STRIP
    p_first = tl.program_id(2) * rows_per_program
    pixel = tl.cast(N, tl.int64) * C
    offs = chunk[:, None] * 8 + tl.arange(0, 8)[None, :]
    # A row stands here once, for the compiler's sake: Triton's time grows with the cube of the
    # straight line. So the first turn makes nothing but the top row of the first window.
    row = ()
    for _ in tl.static_range(STRIP):
        row += (tl.zeros((T, 8), tl.int32),)  # type: ignore[assignment]
    for p in range(p_first - 1, tl.minimum(p_first + rows_per_program, P)):
        best = ()
        for i in tl.static_range(STRIP):
            best += (row[i] + 6,)  # type: ignore[assignment]
        for h in range(tl.where(p < p_first, 2 * p + 2, 2 * p + 1), 2 * p + 3):
            row = _row_keys(
                x_ptr, tl.minimum(h, H - 1), 2 * q, W, pixel, chunks, 9 + 3 * (2 * p + 2 - h),
                START, SIGNED, EVEN, T, STRIP,
            )  # fmt: skip
            maxima = ()
            for i in tl.static_range(STRIP):
                maxima += (tl.maximum(best[i], row[i]),)  # type: ignore[assignment]
            best = maxima
        if p >= p_first:
            out = (p * Q + q).to(tl.int64) * pixel + offs
            for i in tl.static_range(STRIP):
                if q + i < Q:
                    _store_maximum(
                        y_ptr, argmax_ptr, out + i * pixel, mask, best[i], save, UNIT, SIGNED
                    )


@triton.jit
def _scaled8(dy, a, d):
    """dy d^-0.75 of 8 columns, and that times a / d."""
    z = ()
    t = ()
    for i in tl.static_range(8):
        root = tl.math.rsqrt(d[i])
        scaled = dy[i] * (root * tl.sqrt(root))
        z += (scaled,)
        t += (scaled * a[i] * (root * root),)
    return z, t


@triton.jit
def _lrn_bwd_pixel(
    x_ptr, dx_ptr, dy, total, chunks, START: tl.constexpr, UNIT: tl.constexpr,
    MASK: tl.constexpr, EVEN: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one pixel of x, from dy [T, 8], that of its normalised values.

    With MASK it is zero where x is, and ``total`` grows by it.
    """
    a, d = _denominators(x_ptr, chunks, START, EVEN, T)
    chunk, mask, left, right = chunks
    z, t = _scaled8(_split8(dy, T), a, d)
    lane = tl.arange(0, T)
    before = tl.maximum(lane - 1, 0)
    after = tl.minimum(lane + 1, T - 1)
    l6 = tl.where(left, tl.gather(t[6], before, 0), 0.0)
    l7 = tl.where(left, tl.gather(t[7], before, 0), 0.0)
    r0 = tl.where(right, tl.gather(t[0], after, 0), 0.0)
    r1 = tl.where(right, tl.gather(t[1], after, 0), 0.0)
    t01, t23, t45, t67 = t[0] + t[1], t[2] + t[3], t[4] + t[5], t[6] + t[7]
    gradients = (
        z[0] - 1.5 * a[0] * (l6 + l7 + t01 + t[2]),
        z[1] - 1.5 * a[1] * (l7 + t01 + t23),
        z[2] - 1.5 * a[2] * (t01 + t23 + t[4]),
        z[3] - 1.5 * a[3] * (t[1] + t23 + t45),
        z[4] - 1.5 * a[4] * (t23 + t45 + t[6]),
        z[5] - 1.5 * a[5] * (t[3] + t45 + t67),
        z[6] - 1.5 * a[6] * (t45 + t67 + r0),
        z[7] - 1.5 * a[7] * (t[5] + t67 + r0 + r1),
    )
    dx = join8(gradients, T)
    offs = chunk[:, None] * 8 + tl.arange(0, 8)[None, :]
    dx *= UNIT
    if MASK:
        x = join8(a, T)
        dx = tl.where(x <= 0, 0.0, dx)  # a NaN hands its gradient on, as in torch
        total += dx
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask[:, None])
    return total


@triton.jit
def _load_window(
    dy_ptr, share_ptr, argmax_ptr, p, q, P, Q, pixel, chunk, chunks, SHARED: tl.constexpr
):
    """dy and the position of the maximum at pooled pixel (p, q), none outside the map."""
    inside = (p >= 0) & (p < P) & (q >= 0) & (q < Q)
    mask = (chunk < tl.where(inside, chunks, 0))[:, None]
    offs = (p * Q + q).to(tl.int64) * pixel + chunk[:, None] * 8 + tl.arange(0, 8)[None, :]
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if SHARED:
        dy += tl.load(share_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return dy, tl.load(argmax_ptr + offs, mask=mask, other=255).to(tl.int32)


@triton.jit
def _store_sums(sum_ptr, total, chunk, lane, IMAGE: tl.constexpr, T: tl.constexpr):
    """Store the sums of a program, total [T, 8], over the images whose chunks it holds.

    IMAGE is the chunks of an image. Of neighbouring images the first takes the sum, in a tree.
    """
    for half in tl.static_range(7, -1, -1):
        if IMAGE << half < T:
            other = lane + (IMAGE << half)
            index = tl.minimum(other, T - 1)[:, None] + tl.zeros((T, 8), tl.int32)
            total += tl.where((other < T)[:, None], tl.gather(total, index, 0), 0.0)
    place = tl.program_id(0) + tl.num_programs(0) * (
        tl.program_id(1) + tl.num_programs(1) * tl.program_id(2)
    )
    offs = (place.to(tl.int64) * IMAGE + chunk % IMAGE)[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(sum_ptr + offs, total, mask=(lane < IMAGE)[:, None])


@triton.jit
def _lrn_max_pool2d_chunks_bwd_kernel(
    x_ptr,  # [H, W, N, C]
    dy_ptr,  # [P, Q, N, C]
    share_ptr,  # as dy, read where SHARED
    argmax_ptr,  # uint8 [P, Q, N, C]
    dx_ptr,  # [H, W, N, C]
    sum_ptr,  # float32 [programs, C], written where MASK
    N,
    H,
    W,
    P,
    Q,
    rows_per_program,
    C: tl.constexpr,
    GROUP: tl.constexpr,  # chunks of a group of channels
    USED: tl.constexpr,  # chunks of a program: whole groups, at most T
    START: tl.constexpr,
    UNIT: tl.constexpr,
    SHARED: tl.constexpr,  # the gradient is dy and another share of it
    MASK: tl.constexpr,  # x comes from a ReLU: apply its mask too, and sum what is written
    EVEN: tl.constexpr,
    T: tl.constexpr,
):
    wait_for_predecessor()
    chunks = N * (C // 8)
    lane = tl.arange(0, T)
    chunk = tl.where(lane < USED, tl.program_id(0) * USED + lane, chunks)
    mask = chunk < chunks
    place = chunk % GROUP
    here = (chunk, mask, mask & (place != 0), mask & (place != GROUP - 1))
    q = tl.program_id(1)
    p_first = tl.program_id(2) * rows_per_program
    pixel = tl.cast(N, tl.int64) * C
    # Windows above and to the left of (p, q), above, to the left, and (p, q) itself.
    dy_al, at_al = _load_window(
        dy_ptr, share_ptr, argmax_ptr, p_first - 1, q - 1, P, Q, pixel, chunk, chunks, SHARED
    )
    dy_a, at_a = _load_window(
        dy_ptr, share_ptr, argmax_ptr, p_first - 1, q, P, Q, pixel, chunk, chunks, SHARED
    )
    total = tl.zeros((T, 8), tl.float32)
    for p in range(p_first, tl.minimum(p_first + rows_per_program, (H + 1) // 2)):
        dy_l, at_l = _load_window(
            dy_ptr, share_ptr, argmax_ptr, p, q - 1, P, Q, pixel, chunk, chunks, SHARED
        )
        dy, at = _load_window(
            dy_ptr, share_ptr, argmax_ptr, p, q, P, Q, pixel, chunk, chunks, SHARED
        )
        base = (2 * p * W + 2 * q).to(tl.int64) * pixel
        grad = tl.where(at == 0, dy, 0.0) + tl.where(at_l == 2, dy_l, 0.0)
        grad += tl.where(at_a == 6, dy_a, 0.0) + tl.where(at_al == 8, dy_al, 0.0)
        total = _lrn_bwd_pixel(
            x_ptr + base, dx_ptr + base, grad, total, here, START, UNIT, MASK, EVEN, T
        )
        if 2 * q + 1 < W:
            grad = tl.where(at == 1, dy, 0.0) + tl.where(at_a == 7, dy_a, 0.0)
            at_x = base + pixel
            total = _lrn_bwd_pixel(
                x_ptr + at_x, dx_ptr + at_x, grad, total, here, START, UNIT, MASK, EVEN, T
            )
        if 2 * p + 1 < H:
            at_x = base + W * pixel
            grad = tl.where(at == 3, dy, 0.0) + tl.where(at_l == 5, dy_l, 0.0)
            total = _lrn_bwd_pixel(
                x_ptr + at_x, dx_ptr + at_x, grad, total, here, START, UNIT, MASK, EVEN, T
            )
            if 2 * q + 1 < W:
                at_x = base + (W + 1) * pixel
                grad = tl.where(at == 4, dy, 0.0)
                total = _lrn_bwd_pixel(
                    x_ptr + at_x, dx_ptr + at_x, grad, total, here, START, UNIT, MASK, EVEN, T
                )
        dy_al, at_al, dy_a, at_a = dy_l, at_l, dy, at
    if MASK:
        _store_sums(sum_ptr, total, chunk, lane, C // 8, T)


def _last_end(programs: int, work: float, resident: int, name: str) -> float:
    """When the last of programs of so much ``work`` ends, of which a processor holds some at once.

    They share it; fewer than ``_LEAST`` would wait for memory most of the time.
    """
    processors = PROCESSORS.get(name, 128)
    places = min(resident, max(triton.cdiv(programs, processors), _LEAST))
    return float(triton.cdiv(programs, places * processors) * places * work)


def _longest(splits: Sequence[Split], last_end: Callable[[Split], float]) -> Split:
    """The first of ``splits`` with which the last program ends first, or hardly later."""
    best = min(map(last_end, splits))
    return next(split for split in splits if last_end(split) <= 1.02 * best)


@functools.lru_cache(maxsize=1024)
def _forward_split(chunks: int, size: tuple[int, int], name: str) -> tuple[int, int]:
    """Pooled columns and rows of a program with which the last one ends first.

    ``chunks`` programs are side by side. Each reads a row and a column of x more than it pools, two
    by two.
    """
    rows, columns = size

    def last_end(split: tuple[int, int]) -> float:
        strip, share = split
        programs = chunks * triton.cdiv(columns, strip) * triton.cdiv(rows, share)
        return _last_end(programs, (2 * strip + 1) * (2 * share + 1), _RESIDENT[strip], name)

    return _longest(list(itertools.product(_RESIDENT, range(max(rows, 1), 0, -1))), last_end)


@functools.lru_cache(maxsize=1024)
def _backward_split(rows: int, programs: int, name: str) -> int:
    """Rows of a program, for ``programs`` in the other directions, that let the last end first."""

    def last_end(share: int) -> float:
        return _last_end(programs * triton.cdiv(rows, share), share + 0.5, 4, name)

    return _longest(range(max(rows, 1), 0, -1), last_end)


def _constants(x: Tensor, norm: Norm, groups: int, T: int) -> dict[str, Any]:
    """Constants of both kernels; their sums start at START, what these give is UNIT too small."""
    C = x.shape[3]
    return {
        "C": C, "GROUP": C // groups // CHUNK, "START": norm.offset / norm.scale,
        "UNIT": norm.scale**-0.75, "T": T, "num_warps": T // 32,
    }  # fmt: skip


def forward(x: Tensor, y: Tensor, argmax: Tensor, norm: Norm, groups: int, save: bool) -> None:
    """Fill y and, where ``save``, argmax, both [P, Q, N, G*C], from x [H, W, N, G*C]."""
    (H, W, N, C), (P, Q, _, _) = x.shape, y.shape
    chunks, T, name = N * C // CHUNK, _CHUNKS, target(x.device)
    if name in ("sm_120", "sm_121"):
        T *= 2  # ptxas gives 4 warps 80 registers there, and they spill
    strip, rows = _forward_split(triton.cdiv(chunks, T), (P, Q), name)
    T, strip, rows = tuned((T, strip, rows), x, "lrn forward", N, H, W, P, Q, C, groups)
    grid = (triton.cdiv(chunks, T), triton.cdiv(Q, strip), triton.cdiv(P, rows))
    launch(
        _lrn_max_pool2d_chunks_fwd_kernel, grid, x, y, argmax, N, H, W, P, Q, rows, int(save),
        SIGNED=norm.signed, EVEN=chunks % T == 0, STRIP=strip, **_constants(x, norm, groups, T),
        counted=max(N * C, H * W),
    )  # fmt: skip


def backward(
    x: Tensor,
    dy: Tensor,
    share: Tensor | None,
    argmax: Tensor,
    dx: Tensor,
    norm: Norm,
    groups: int,
    mask: bool = False,
) -> Tensor | None:
    """Fill dx [H, W, N, G*C] from x, and argmax and dy, or both shares of it, [P, Q, N, G*C].

    With ``mask`` x comes from a ReLU: dx is zero where x is, and its sums are returned, in parts
    [parts, G*C].
    """
    (H, W, N, C), (P, Q, _, _) = x.shape, dy.shape
    chunks, group, T = N * C // CHUNK, C // groups // CHUNK, _CHUNKS
    columns, pairs = triton.cdiv(W, 2), triton.cdiv(H, 2)  # of columns and of rows
    rows = _backward_split(
        pairs, triton.cdiv(chunks, T // group * group) * columns, target(x.device)
    )
    T, rows = tuned((T, rows), x, "lrn backward", N, H, W, P, Q, C, groups)
    used = T // group * group
    grid = (triton.cdiv(chunks, used), columns, triton.cdiv(pairs, rows))
    sums = None
    if mask and C <= CHUNK * T:  # a program sums whole images
        sums = dx.new_empty((math.prod(grid), C), dtype=torch.float32)
    launch(
        _lrn_max_pool2d_chunks_bwd_kernel, grid, x, dy, dy if share is None else share, argmax, dx,
        dx if sums is None else sums, N, H, W, P, Q, rows, USED=used, SHARED=share is not None,
        MASK=sums is not None,
        EVEN=chunks % T == 0 and used == T, **_constants(x, norm, groups, T),
        counted=max(N * C, H * W),
    )  # fmt: skip
    return sums
