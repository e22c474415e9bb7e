"""Columns that a thread holds one by one, joined to a tile without moving a value."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def join8(v0, v1, v2, v3, v4, v5, v6, v7, T: tl.constexpr):
    """[T, 8] of its 8 columns."""
    even = tl.reshape(tl.join(tl.join(v0, v4), tl.join(v2, v6)), [T, 4])
    odd = tl.reshape(tl.join(tl.join(v1, v5), tl.join(v3, v7)), [T, 4])
    return tl.reshape(tl.join(even, odd), [T, 8])
