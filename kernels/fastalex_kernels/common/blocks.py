"""Blocks of values inside a kernel: loaded with no more masks than needed, joined of columns."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_block(ptrs, mask_row, mask_column, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr):
    """A block with zeros where a mask is False; an even axis needs none."""
    if EVEN_ROWS and EVEN_COLUMNS:
        block = tl.load(ptrs)
    elif EVEN_COLUMNS:
        block = tl.load(ptrs, mask=mask_row[:, None], other=0.0)
    elif EVEN_ROWS:
        block = tl.load(ptrs, mask=mask_column[None, :], other=0.0)
    else:
        block = tl.load(ptrs, mask=mask_row[:, None] & mask_column[None, :], other=0.0)
    return block


@triton.jit
def join8(v, T: tl.constexpr):
    """[T, 8] of 8 columns that a thread holds one by one, without moving a value."""
    even = tl.reshape(tl.join(tl.join(v[0], v[4]), tl.join(v[2], v[6])), [T, 4])
    odd = tl.reshape(tl.join(tl.join(v[1], v[5]), tl.join(v[3], v[7])), [T, 4])
    return tl.reshape(tl.join(even, odd), [T, 8])
