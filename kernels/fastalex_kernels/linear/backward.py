"""Both gradients of a fully connected layer, and its update, in one pass over the weight.

    dx [M, K] = dz [M, N] w [N, K]      g [N, K] = dz^T [N, M] x [M, K]
    w, v <- momentum(w, v, g)

The update reads the float32 weight in any case. Rounded as its copy is, it gives the input's
gradient, too, the same bits, so that nobody reads the copy backward. A program owns a strip of
inputs: x and the sums dx of all images stay, while it walks down the outputs. Strips share
nothing, so there are no partial sums. 18 bytes a parameter limit the kernel, where enough of them
are under way: all strips run at once, and blocks of later turns load while one is used.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common.arguments import aligned
from ..common.backend import interpreted, target
from ..common.dependent import wait_for_predecessor
from ..common.launch import launch
from ..common.philox import load_rng
from ..common.tuned import PROCESSORS, cut, dot_precision, tuned
from ..momentum import (
    MomentumUpdate,
    Updates,
    columns,
    load_rate,
    momentum_step,
    rounded,
    update_by,
)

_IMAGES = 256  # at most, whose x and dx a program holds
_INPUTS, _OUTPUTS = 32, 64  # of a strip, 128 bytes of a row of the weight; of a turn
_WARPS = 8
_SHARED = 228 << 10  # bytes of a processor of sm_90
_FEWEST = 0.45  # strips for each processor


@triton.jit
def _linear_bwd_kernel(
    dz_ptr,  # descriptors, all but the last two: [M, N]
    x_ptr,  # [M, K]
    dx_ptr,  # [M, K]
    w_ptr,  # float32 [N, K]
    v_ptr,  # [N, K], bfloat16 where ROUND, else float32
    operand_ptr,  # [N, K], written where HAS_OPERAND
    square_ptr,  # float32 [programs]
    rate_ptr,  # float32 [3]
    rng_ptr,  # int64 [5], read where ROUND
    bias_w_ptr,  # where BIAS, and what follows, is as above for a bias [N]
    bias_v_ptr,
    bias_operand_ptr,
    bias_square_ptr,  # float32 [ceil(N / BLOCK_N)]
    bias_rate_ptr,
    N,
    column,  # of the weight, of which x is the first
    scale,  # of the gradients
    PAPER: tl.constexpr,
    HAS_OPERAND: tl.constexpr,
    ROUND: tl.constexpr,  # 0, or as in ``draw_bits``
    BIAS: tl.constexpr,
    BIAS_HAS_OPERAND: tl.constexpr,
    MASK: tl.constexpr,  # x is the output of a ReLU: dx is zero where x is
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # no less than M; what lies outside is read as zero and not stored
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,  # of the loop
):
    wait_for_predecessor()
    program = tl.program_id(0)
    if BIAS:
        for block in range(program, tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
            offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
            db = scale * tl.sum(dz_ptr.load([0, block * BLOCK_N]).to(tl.float32), axis=0)
            update_by(
                db, bias_w_ptr, bias_v_ptr, bias_operand_ptr, bias_square_ptr + block,
                bias_rate_ptr, offs_n, offs_n < N, offs_n, offs_n < N, PAPER, BIAS_HAS_OPERAND,
            )  # fmt: skip
    k = program * BLOCK_K
    x = x_ptr.load([0, k])
    # Once: a load in the loop would be waited for in each turn.
    rate, rng = load_rate(rate_ptr), load_rng(rng_ptr, ROUND)
    dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for n in tl.range(0, N, BLOCK_N, num_stages=STAGES):  # said here, it holds for v, too
        w = w_ptr.load([n, k])
        v = v_ptr.load([n, k]).to(tl.float32)
        dz = dz_ptr.load([0, n])
        dx = tl.dot(dz, w.to(dz.dtype), dx, input_precision=PRECISION)
        g = scale * tl.dot(dz.T, x, input_precision=PRECISION)
        squares += tl.sum(g * g, axis=1)
        w, v = momentum_step(w, v, g, rate, PAPER)
        w_ptr.store([n, k], w)
        v_ptr.store([n, k], rounded(v, rng, n + tl.arange(0, BLOCK_N), column + k, ROUND))
        if HAS_OPERAND:
            operand_ptr.store([n, k], w.to(dz.dtype))
    tl.store(square_ptr + program, tl.sum(squares))
    if MASK:  # a NaN hands its gradient on, as in torch
        dx = tl.where(x_ptr.load([0, k]).to(tl.float32) <= 0, 0.0, dx)
    dx_ptr.store([0, k], (scale * dx).to(x.dtype))


def _rows(images: int) -> int:
    """Images as a program counts them: a product of sm_90 has 64 rows, or more."""
    return cut(_IMAGES, images) if interpreted() else max(cut(_IMAGES, images), 64)


def _stages(x: Tensor) -> int:
    """Of the pipeline: the blocks for which all strips at once leave room in shared memory.

    Two on a processor in any case: a smaller GPU of the target has fewer processors.
    """
    strips, rows = triton.cdiv(x.shape[1], _INPUTS), _rows(len(x))
    each = max(triton.cdiv(strips, PROCESSORS["sm_90"]), 2)
    block = _OUTPUTS * (2 * rows + 8 * _INPUTS)  # of dz; of weight and momentum buffer in float32
    return int(min((_SHARED // each - 1024 - 2 * rows * _INPUTS) // block, 4))


def fits(dz: Tensor, x: Tensor, update: MomentumUpdate, half: int | None = None) -> bool:
    """Whether one pass can be made, and gains: strips for all processors, and room for them."""
    if not interpreted():
        if target(x.device) != "sm_90" or x.element_size() != 2 or _stages(x) < 2:
            return False
        if x.shape[1] < _FEWEST * PROCESSORS["sm_90"] * _INPUTS:
            return False
    described = (dz, x, *(columns(y, half) for y in (update.parameter, update.buffer)))
    unit = 16 // min(y.element_size() for y in described)  # a row of one begins at 16 bytes
    return 0 < len(x) <= _IMAGES and all(
        y.stride(1) == 1 and y.stride(0) > 0 and y.stride(0) % unit == 0 and aligned(y)
        for y in described
    )


def linear_backward_update(
    dz: Tensor,
    x: Tensor,
    updates: Updates,
    p: float = 0.0,
    mask: bool = False,
    half: int | None = None,
) -> Tensor:
    """The gradient of x, dz [M, N] w [N, K] / (1 - p), of the weight as it was, which is updated.

    Args:
        dz: gradient [M, N] before the layer's ReLU.
        x: [M, K]; both as ``fits`` demands.
        updates: of the weight [N, K] and of the bias, by one rule.
        p: of the dropout whose scale is not in ``dz`` yet.
        mask: whether a ReLU made x, whose backward pass is to be done, too.
        half: 0 or 1 where x is read by half of the weight's columns; the rest stays.

    Returns:
        [M, K], of x's dtype.
    """
    (M, N), K, (update, bias) = dz.shape, x.shape[1], updates
    own = (1024, 1024, 4, 1) if interpreted() else (_OUTPUTS, _INPUTS, _WARPS, max(_stages(x), 2))
    block_n, block_k, warps, stages = tuned(own, x, "linear backward", M, N, K)
    block_m, block_n, block_k = _rows(M), cut(block_n, N), cut(block_k, K)
    programs, dx, (rng, share) = triton.cdiv(K, block_k), x.new_empty(x.shape), update.rounding(K)
    *weight, square = written = update.written(programs, half)
    beside, bias_written = update, written
    if bias is not None:
        beside, bias_written = bias, bias.written(triton.cdiv(N, block_n))
    rows, tile = (block_m, block_k), (block_n, block_k)
    described = [(dz, (block_m, block_n)), (x, rows), (dx, rows), *((w, tile) for w in weight)]
    launch(
        _linear_bwd_kernel, (programs,),
        *(TensorDescriptor.from_tensor(y, list(block)) for y, block in described),
        square, update.rate, rng, *bias_written, beside.rate,
        N, (half or 0) * K, 1.0 / (1.0 - p),
        PAPER=update.rule == "paper", HAS_OPERAND=update.operand is not None, ROUND=share,
        BIAS=bias is not None, BIAS_HAS_OPERAND=beside.operand is not None, MASK=mask,
        PRECISION=dot_precision(x, "linear"), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        STAGES=stages, num_warps=warps, num_stages=stages, counted=max(N, K),
    )  # fmt: skip
    return dx
