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
def next_tap(r, s, c, s_lo, s_hi, BLOCK_K: tl.constexpr, C: tl.constexpr):
    """Advance the odometer (r, s, c) of the flat reduction by one block of channels."""
    c += BLOCK_K
    wrap = c >= C
    c = tl.where(wrap, 0, c)
    s = tl.where(wrap, s + 1, s)
    wrap = s == s_hi
    return tl.where(wrap, r + 1, r), tl.where(wrap, s_lo, s), c


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
        and x.shape[3] // groups % 8 == 0
        and aligned(x)
        and math.prod(x.shape[:3]) < 2**31
        for x in operands
    )


def row_blocks(matrix: Tensor, rows: int, block: int, tail: int) -> tuple[TensorDescriptor, ...]:
    """Descriptors of the rows of [..., channels], in blocks of channels and of those of a tail."""
    flat = matrix.view(-1, matrix.shape[3])
    return tuple(TensorDescriptor.from_tensor(flat, [rows, b]) for b in (block, tail or block))
