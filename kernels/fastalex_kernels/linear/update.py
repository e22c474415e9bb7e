"""The weight gradient of a fully connected layer, applied where it is made.

    g [N, K] = dz^T [N, M] x [M, K]        w, v <- momentum(w, v, g)

A tile of g never leaves the registers: the program that made it reads the same tile of the weight
and its momentum buffer, and writes both and the copy that the products read. A batch of 128 is two
steps of the product, so the kernel is bound by these 18 bytes a parameter.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ..common.dependent import wait_for_predecessor
from ..common.launch import launch
from ..common.philox import load_rng
from ..linear.forward import product_tile
from ..linear.product import operands, product
from ..momentum import MomentumUpdate, load_rate, momentum_step, rounded, update_by

# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages) by target and operand width.
_TILES = {
    ("sm_80", 16): (64, 64, 128, 4, 2),
    ("sm_90", 16): (64, 64, 128, 4, 2),
    ("sm_100", 16): (64, 64, 128, 4, 2),
    ("gfx942", 16): (64, 64, 64, 8, 2),
    ("other", 16): (64, 64, 128, 4, 2),
    ("other", 32): (32, 64, 32, 8, 2),
    "interpreter": (1024, 1024, 1024, 4, 1),
}
# A batch of 512 or more is bound by what passes through L2.
_LARGE_BATCH_TILES = {**_TILES, ("sm_90", 16): (128, 64, 64, 8, 4)}
_ROWS = tl.constexpr(64)  # of dz that a bias's sums take in one go


@triton.jit
def _column_sums(x_ptr, stride, rows, columns, offs, BLOCK: tl.constexpr):
    """float32 sums of the columns ``offs`` of x [rows, columns], rows ``stride`` apart."""
    offs_r = tl.arange(0, _ROWS)
    ptrs = x_ptr + offs_r.to(tl.int64)[:, None] * stride + offs[None, :]
    total = tl.zeros((_ROWS, BLOCK), tl.float32)
    for first in range(0, rows, _ROWS):
        mask = (offs_r < rows - first)[:, None] & (offs < columns)[None, :]
        x = tl.load(ptrs + tl.cast(first, tl.int64) * stride, mask=mask, other=0.0)
        total += x.to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def _linear_bwd_weight_update_kernel(
    a_ptr,  # dz transposed, [M, K]; M here are outputs, K images, N inputs
    x_ptr,  # [K, N]
    w_ptr,  # float32 [M, N], its rows stride_w apart
    v_ptr,  # as w, bfloat16 where ROUND
    operand_ptr,  # as w, written where HAS_OPERAND
    square_ptr,  # float32 [programs]
    rate_ptr,  # float32 [3]
    rng_ptr,  # int64 [5], read where ROUND
    dz_ptr,  # [K, M], read where BIAS, and what follows is as above for a bias [M]
    bias_w_ptr,
    bias_v_ptr,
    bias_operand_ptr,
    bias_square_ptr,
    bias_rate_ptr,
    M,
    N,
    K,
    stride_a,
    stride_x,
    stride_dz,
    stride_w,
    column,  # of the weight, of which x is the first
    scale,  # of the gradients
    PAPER: tl.constexpr,
    HAS_OPERAND: tl.constexpr,
    ROUND: tl.constexpr,  # 0, or as in ``draw_bits``
    BIAS: tl.constexpr,
    BIAS_HAS_OPERAND: tl.constexpr,
    TMA: tl.constexpr,
    A_COLUMNS: tl.constexpr,
    W_COLUMNS: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_predecessor()
    M = M // ALIGN * ALIGN
    N = N // ALIGN * ALIGN
    stride_a = stride_a // ALIGN * ALIGN
    stride_x = stride_x // ALIGN * ALIGN
    stride_dz = stride_dz // ALIGN * ALIGN
    stride_w = stride_w // ALIGN * ALIGN
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    if BIAS and program < tl.num_programs(1):  # the first to run, whichever weights are theirs
        offs_b = program * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_b = offs_b < M
        db = scale * _column_sums(dz_ptr, stride_dz, K, M, offs_b, BLOCK_M)
        update_by(
            db, bias_w_ptr, bias_v_ptr, bias_operand_ptr, bias_square_ptr + program,
            bias_rate_ptr, offs_b, mask_b, offs_b, mask_b, PAPER, BIAS_HAS_OPERAND,
        )  # fmt: skip
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    g = product(
        a_ptr, x_ptr, M, N, K, stride_a, stride_x, offs_m, offs_n, 0, K, TMA, A_COLUMNS, W_COLUMNS,
        EVEN_M, EVEN_N, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    offs = offs_m.to(tl.int64)[:, None] * stride_w + offs_n[None, :]
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    w = tl.load(w_ptr + offs, mask=mask, other=0.0)
    v = tl.load(v_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    # What lies outside was read as zero, so it adds nothing to the norm.
    tl.store(square_ptr + program, scale * scale * tl.sum(tl.sum(g * g, axis=1)))
    w, v = momentum_step(w, v, scale * g, load_rate(rate_ptr), PAPER)
    tl.store(w_ptr + offs, w, mask=mask)
    v = rounded(v, load_rng(rng_ptr, ROUND), offs_m, column + tl.program_id(0) * BLOCK_N, ROUND)
    tl.store(v_ptr + offs, v, mask=mask)
    if HAS_OPERAND:
        tl.store(operand_ptr + offs, w.to(operand_ptr.dtype.element_ty), mask=mask)


def linear_backward_weight_update(
    dz: Tensor,
    x: Tensor,
    update: MomentumUpdate,
    bias: MomentumUpdate | None = None,
    p: float = 0.0,
    half: int | None = None,
) -> None:
    """Update the weight [N, K] by its gradient, dz [M, N] transposed times x [M, K] / (1 - p).

    Args:
        dz: its rows are contiguous.
        x: of any strides.
        update: of the weight.
        bias: the update of the bias beside it, by the same rule, if it is wanted.
        p: of the dropout whose scale is not in ``dz`` yet.
        half: 0 or 1 where x, and the gradient, are of half of the weight's columns.
    """
    w = update.parameter
    (M, K), N = x.shape, len(w)
    table = _TILES if M < 512 else _LARGE_BATCH_TILES
    tile = product_tile(table, x, "linear update", (N, K, M), N, K, M)
    grid = (triton.cdiv(K, tile["BLOCK_N"]), triton.cdiv(N, tile["BLOCK_M"]))
    (dz_given, x_given, *sizes), constants = operands(dz.t(), x, tile)
    written = update.written(grid[0] * grid[1], half)
    beside, (rng, share) = update if bias is None else bias, update.rounding(K)
    bias_written = written if bias is None else bias.written(grid[1])
    launch(
        _linear_bwd_weight_update_kernel, grid, dz_given, x_given, *written, update.rate,
        rng, dz, *bias_written, beside.rate, *sizes, dz.stride(0), w.stride(0), (half or 0) * K,
        1.0 / (1.0 - p), PAPER=update.rule == "paper", HAS_OPERAND=update.operand is not None,
        ROUND=share, BIAS=bias is not None, BIAS_HAS_OPERAND=beside.operand is not None,
        ALIGN=math.gcd(8, sizes[0], sizes[1], sizes[3], sizes[4], dz.stride(0), w.stride(0)),
        **constants, counted=max(w.shape[1], N, M),
    )  # fmt: skip
