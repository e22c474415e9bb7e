"""What the backward of every fused layer begins with: ReLU and dropout undone, the bias summed.

With y = dropout(relu(z)) and z = (linear part) + bias, the gradient at z is

    dz = dy * scale   where y kept z, else 0        (scale = 1 / (1 - p), or 1 without dropout)

and the bias gradient is its column sum. A kept, positive z is exactly a positive y, so with ReLU
the output itself is the mask, and no random number is drawn again; without ReLU the mask is
recomputed from its counter.

Layout: y, dy, dz [rows, features], contiguous; HWNC tensors are [H * W * N, C].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import philox
from ..common.backend import interpreted
from ..common.dependent import wait_for_predecessor
from ..common.launch import launch
from ..common.parameters import NO_DROPOUT, Dropout

_PROGRAMS = 512  # at most this many row chunks, so that the second stage stays short


@triton.jit
def _epilogue_bwd_kernel(
    dy_ptr,  # [rows, features]
    y_ptr,  # [rows, features], read where RELU
    rng_ptr,  # int64 [2], read where PHILOX
    dz_ptr,  # [rows, features], written where WRITE_DZ
    part_ptr,  # float32 [chunks, features], written where WRITE_DB
    rows,
    features,
    rows_per_chunk,
    p,
    scale,
    row_offset,
    feature_offset,
    RELU: tl.constexpr,
    PHILOX: tl.constexpr,
    WRITE_DZ: tl.constexpr,
    WRITE_DB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    wait_for_predecessor()
    chunk = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < features
    first = chunk * rows_per_chunk
    last = tl.minimum(first + rows_per_chunk, rows)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask = (offs_m < last)[:, None] & mask_n[None, :]
        offs = offs_m.to(tl.int64)[:, None] * features + offs_n[None, :]
        dz = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32) * scale
        if RELU:
            y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            dz = tl.where(y <= 0, 0.0, dz)  # a NaN hands its gradient on, as in torch
        if PHILOX:
            kept = philox.keep(
                rng_ptr, (offs_m + row_offset)[:, None], (offs_n + feature_offset)[None, :], p
            )
            dz = tl.where(kept, dz, 0.0)
        if WRITE_DZ:
            tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        if WRITE_DB:
            total += tl.sum(tl.where(mask, dz, 0.0), axis=0)
    if WRITE_DB:
        tl.store(part_ptr + chunk.to(tl.int64) * features + offs_n, total, mask=mask_n)


def epilogue_backward(
    dy: Tensor,
    y: Tensor | None,
    *,
    need_dz: bool = True,
    need_sums: bool = False,
    dropout: Dropout = NO_DROPOUT,
) -> tuple[Tensor | None, Tensor | None]:
    """Undo ReLU and dropout, and sum the bias gradient in parts, in one pass over ``dy``.

    Args:
        dy: gradient of the output, [rows, features], contiguous.
        y: the output itself if a ReLU made it, else None.
        dropout: that made ``y``.

    Returns:
        dz, ``dy`` itself where nothing masks, and float32 sums of it [parts, features]; None for
        what is not needed.
    """
    (rows, features), (p, rng, *offsets) = dy.shape, dropout
    philox = p > 0 and y is None
    write_dz = need_dz and (philox or y is not None)
    if not write_dz and not need_sums:
        return (dy if need_dz else None), None
    block_n = max(1, min(triton.next_power_of_2(features), 128))
    block_m = 4096 if interpreted() else 4096 // block_n
    chunk_rows = triton.cdiv(triton.cdiv(max(rows, 1), _PROGRAMS), block_m) * block_m
    chunks = triton.cdiv(max(rows, 1), chunk_rows)
    dz = torch.empty_like(dy) if write_dz else dy
    sums = dy.new_empty((chunks, features), dtype=torch.float32)
    launch(
        _epilogue_bwd_kernel, (chunks, triton.cdiv(features, block_n)), dy,
        dy if y is None else y, dy if rng is None else rng, dz, sums, rows, features, chunk_rows,
        p, 1.0 / (1.0 - p), *offsets, RELU=y is not None, PHILOX=philox, WRITE_DZ=write_dz,
        WRITE_DB=need_sums, BLOCK_M=block_m, BLOCK_N=block_n, counted=max(rows, features),
    )  # fmt: skip
    return (dz if need_dz else None), (sums if need_sums else None)


def drop(x: Tensor, dropout: Dropout) -> Tensor:
    """Dropout of x [rows, features], contiguous; of the gradient of its output, its backward."""
    dropped, _ = epilogue_backward(x, None, dropout=dropout)
    assert dropped is not None
    return dropped
