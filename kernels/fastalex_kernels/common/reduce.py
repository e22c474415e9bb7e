"""Partial sums, added up in an order that only their shape decides.

A reduction that is split over programs leaves float32 partials [parts, ...]; one kernel adds them
in order: same inputs, same bits, no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common.backend import interpreted
from ..common.dependent import wait_for_predecessor
from ..common.launch import launch

_MOST_PARTIALS = 8192  # that an update adds up: some 32 loads, one waiting for another
_AT_ONCE = 256  # partials that ``fold`` adds up in one program


@triton.jit
def sum_parts(part_ptr, parts, numel, offs, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of part[0..parts - 1, offs], float32, in an order that only the shape decides.

    Several parts are loaded at once: one after the other, each would wait for the memory.
    """
    offs_p = tl.arange(0, PARTS)
    ptrs = part_ptr + offs_p.to(tl.int64)[:, None] * numel + offs[None, :]
    mask = (offs < numel)[None, :]
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, parts, PARTS):
        shift = tl.cast(first, tl.int64) * numel
        part = tl.load(ptrs + shift, mask=mask & (offs_p < parts - first)[:, None], other=0.0)
        total += tl.sum(part, axis=0)
    return total


def blocks(parts: int, numel: int) -> dict[str, int]:
    """PARTS and BLOCK for ``sum_parts``: 16 bytes of a weight a thread, or many parts of a bias."""
    most = 4 if numel > 1 << 15 else 256
    at_once = min(int(triton.next_power_of_2(max(parts, 1))), most)
    return {"PARTS": at_once, "BLOCK": (65536 if interpreted() else 2048) // at_once}


@triton.jit
def _sum_partials_kernel(
    part_ptr,  # float32 [parts, numel]
    out_ptr,  # [numel]
    parts,
    numel,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_predecessor()
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = sum_parts(part_ptr, parts, numel, offs, PARTS, BLOCK)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=offs < numel)


def sum_partials(part: Tensor, out: Tensor) -> Tensor:
    """Add ``part`` [parts, ...] over its first axis, in order, into ``out``, and return it."""
    tile = blocks(part.shape[0], out.numel())
    grid = (triton.cdiv(out.numel(), tile["BLOCK"]),)
    launch(
        _sum_partials_kernel, grid, part, out, part.shape[0], out.numel(), **tile,
        counted=part.shape[0],
    )  # fmt: skip
    return out


def fold(partials: Tensor) -> Tensor:
    """Too many partials [parts, channels] as a few, summed by more programs than channels give."""
    parts, channels = partials.shape
    if parts <= _MOST_PARTIALS:
        return partials
    rows = next(r for r in range(_AT_ONCE, 0, -1) if parts % r == 0)
    if rows < 8:
        return partials
    folded = partials.view(parts // rows, rows * channels)
    return sum_partials(folded, partials.new_empty((rows, channels)))
