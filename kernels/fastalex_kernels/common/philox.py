"""Philox-4x32-10, the counter-based generator of Salmon et al. (SC 2011), bit for bit as Triton's.

One counter gives four 32-bit words, whatever the backend, the tile or the process that asks. The
dropout mask of an element is a function of (seed, offset, row, feature) alone: the counter is
(feature, row, low half of offset, high half of offset), the key is the seed. What rounds an element
of a momentum buffer is one of the eight halves of the words of (column // 8, row, step, number of
the buffer); the key is the seed itself, which no layer's dropout has.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57  # of the two lanes
_KEYS = 0x9E3779B9, 0xBB67AE85  # Weyl sequence of the key
_MASK32 = 0xFFFFFFFF
_UNIFORM_SCALE = 4.6566127342e-10  # just under 2^-31, as in tl.rand


def _mul_hi_lo(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        # The C++ that Inductor writes may not overflow: its compiler takes that to never happen.
        low = (a & 0xFFFF) * m
        high = (a >> 16) * m + (low >> 16)
        return high >> 16, (high & 0xFFFF) << 16 | (low & 0xFFFF)
    # int64 products wrap modulo 2^64, which leaves every bit of the unsigned product right.
    product = a * m
    return (product >> 32) & _MASK32, product & _MASK32


def philox(seed: int | Tensor, *counter: int | Tensor) -> tuple[Tensor, ...]:
    """The four words of Philox-4x32-10 for each counter, int64 tensors of values in [0, 2^32).

    Args:
        seed: the 64-bit key, an int or a scalar int64 tensor.
        counter: four integers modulo 2^32, of which one at least is a tensor; they broadcast.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    device = next(c.device for c in counter if isinstance(c, Tensor))
    key, *words = (torch.as_tensor(c, dtype=torch.int64, device=device) for c in (seed, *counter))
    x0, x1, x2, x3 = torch.broadcast_tensors(*(word & _MASK32 for word in words))
    k0, k1 = key & _MASK32, (key >> 32) & _MASK32
    for _ in range(10):
        high_a, low_a = _mul_hi_lo(x0, _MULTIPLIERS[0])
        high_b, low_b = _mul_hi_lo(x2, _MULTIPLIERS[1])
        x0, x1, x2, x3 = high_b ^ x1 ^ k0, low_b, high_a ^ x3 ^ k1, low_a
        k0, k1 = (k0 + _KEYS[0]) & _MASK32, (k1 + _KEYS[1]) & _MASK32
    return x0, x1, x2, x3


def uniform(word: Tensor) -> Tensor:
    """Map words in [0, 2^32) to float32 in [0, 1) as ``tl.rand`` does."""
    folded = torch.where(word >= 2**31, _MASK32 - word, word)
    return folded.to(torch.float32) * _UNIFORM_SCALE


def keep_mask(
    rng: Tensor, rows: int, features: int, p: float, row_offset: int = 0, feature_offset: int = 0
) -> Tensor:
    """Which elements of [rows, features] dropout keeps, as a ``Dropout`` of p, rng and offsets."""
    row = torch.arange(rows, device=rng.device)[:, None] + row_offset
    feature = torch.arange(features, device=rng.device)[None, :] + feature_offset
    return uniform(philox(rng[0], feature, row, rng[1], rng[1] >> 32)[0]) >= p


def random_bits(rng: Tensor, rows: int, columns: int, first: int = 0) -> Tensor:
    """16 random bits for each element of [rows, columns], as int32.

    Args:
        rng: int64 [5]: seed, step, number of the buffer, and row and column in the whole buffer of
            the first element of the part that is here; the column is a multiple of ``columns``.
        rows: of a block of that part.
        columns: of the part.
        first: row of the part that the block begins with.
    """
    seed, step, number, row, column = rng.unbind()
    cut = columns % 8 > 0  # then the part may begin and end within eight that share a draw
    eighth = torch.arange(columns // 8 + 2 * cut, device=rng.device) + (column >> 3)
    row = torch.arange(first, first + rows, device=rng.device) + row
    words = philox(seed, eighth, row[:, None], step, number)
    halves = [half.to(torch.int32) for word in words for half in (word & 0xFFFF, word >> 16)]
    bits = torch.stack(halves, -1).flatten(1)
    return bits[:, torch.arange(columns, device=rng.device) + (column & 7)] if cut else bits


@triton.jit
def load_rng(rng_ptr, ROUND: tl.constexpr):
    """The numbers of ``random_bits``, where they are needed."""
    rng = (0, 0, 0, 0, 0)
    if ROUND:
        rng = (
            tl.load(rng_ptr), tl.load(rng_ptr + 1).to(tl.int32), tl.load(rng_ptr + 2).to(tl.int32),
            tl.load(rng_ptr + 3).to(tl.int32), tl.load(rng_ptr + 4).to(tl.int32),
        )  # fmt: skip
    return rng


@triton.jit
def draw_bits(rng, row, first, N: tl.constexpr, ROUND: tl.constexpr):
    """``random_bits`` inside a kernel: [M, N], for int32 ``row`` [M] and columns from ``first`` on.

    ROUND 8: eight columns share a draw, where a part has a multiple of 8 of them. ROUND 1: each
    element draws, which costs eight times as much.
    """
    seed, step, number, first_row, first_column = rng
    column = first + first_column + tl.arange(0, N // ROUND) * ROUND
    zero = (row[:, None] + column[None, :]) * 0
    a, b, c, d = tl.philox(
        seed, zero + column[None, :] // 8, zero + row[:, None] + first_row, zero + step,
        zero + number,
    )  # fmt: skip
    if ROUND == 8:
        words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
        bits = tl.interleave(words & 0xFFFF, words >> 16)
    else:
        place = zero + column[None, :] % 8
        word = tl.where(place < 4, tl.where(place < 2, a, b), tl.where(place < 6, c, d))
        bits = (word >> (place % 2 * 16).to(tl.uint32)) & 0xFFFF
    return bits.to(tl.int32)


@triton.jit
def keep(rng_ptr, row, feature, p):
    """``keep_mask`` inside a kernel, for blocks of int32 ``row`` and ``feature`` that broadcast."""
    seed = tl.load(rng_ptr)
    offset = tl.load(rng_ptr + 1)
    zero = (row + feature) * 0
    c2 = zero + (offset & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    c3 = zero + ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    word, _, _, _ = tl.philox(seed, zero + feature, zero + row, c2, c3)
    return tl.uint_to_uniform_float(word) >= p


@triton.jit
def drop(x, rng_ptr, row, first_feature, p):
    """x [M, N] where ``keep_mask`` keeps it, else zero, for int32 ``row`` [M].

    The four words of every element of a large block at once would need more registers than there
    are, so it is taken in four parts.
    """
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    if N < 64 or M * N < 8192:
        feature = first_feature + tl.arange(0, N)
        x = tl.where(keep(rng_ptr, row[:, None], feature[None, :], p), x, 0.0)
    else:
        x = tl.reshape(x, [M, 4, N // 4])
        part = tl.arange(0, 4)[None, :, None]
        feature = first_feature + tl.arange(0, N // 4)
        for i in range(4):
            kept = keep(rng_ptr, row[:, None], (feature + i * (N // 4))[None, :], p)
            x = tl.where(kept[:, None, :] | (part != i), x, 0.0)
        x = tl.reshape(x, [M, N])
    return x
