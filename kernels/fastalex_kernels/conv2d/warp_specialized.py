"""The forward kernel for an H100, in Gluon: one warp fetches, eight multiply.

    y[n, k, p, q] = relu(b[k] + sum_{c, r, s} x[n, c, p + r - top, q + s - left] w[k, c, r, s])

A program takes 128 images of a run of RUN neighbours in a line of the output, and a block of its
channels. Under row r of the weight, the RUN * S taps of these pixels touch S + RUN - 1 columns of
x. Each block of x is fetched once and read into registers once; it is then the left operand of
every product that needs it, one for each pixel, with the weight of another tap. So a product reads
only the weight from shared memory, and its columns can be few: 48 channels are 32 + 16, 96 are
64 + 32, with nothing padded.

The reduction goes in turns, a turn being a row r of the weight and BLOCK_K channels. What a turn
needs, S + RUN - 1 blocks of x and S of the weight, is a stage of shared memory. Stages are a ring
with two barriers each. Turn i takes stage i % STAGES; which round of the ring it is, odd or even,
is the phase that its barriers are waited for:

* ``full``: the fetching warp says how many bytes will come and starts the copies; when all bytes
  are there, the barrier's phase ends, and the products may read.
* ``empty``: the multiplying warps arrive when the last product that reads the stage has ended. The
  fetching warp waits for the round before; in round 0 there is none, and a wait for the phase
  before the first one passes.

The products are asynchronous: those of a block of x are started before those of the block before
are waited for, so that the tensor cores never run dry. A stage is handed back when the products of
the next turn's first block are started and all before them have ended.

No interpreter runs Gluon, and no GPU has run this kernel. tests/kernels/gluon_model.py runs its
source with the warps, copies, products and barriers as agents in random order.

Layout: x [H, W, N, G * C], y [P, Q, N, G * K], HWNC in memory (see ``forward``).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ..common.dependent import wait_for_predecessor


@gluon.jit
def _fetch(
    x_desc, w_desc, w_tail_desc, xs, ws, w_tails, full, empty, p, q, n, g, k, r_lo, r_hi, N, H, W,
    C: gl.constexpr, K: gl.constexpr, R: gl.constexpr, S: gl.constexpr, PAD_H: gl.constexpr,
    PAD_W: gl.constexpr, REVERSE: gl.constexpr, RUN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The fetching warp: load what each turn needs, as soon as its stage is empty."""
    POSITIONS: gl.constexpr = S + RUN - 1
    BLOCK_K: gl.constexpr = x_desc.block_shape[1]
    BLOCK_N: gl.constexpr = w_desc.block_shape[0 if REVERSE else 1]
    X_BYTES: gl.constexpr = POSITIONS * x_desc.block_type.nbytes
    W_BYTES: gl.constexpr = S * (w_desc.block_type.nbytes + w_tail_desc.block_type.nbytes)
    stage = 0
    phase = 1  # of the round before the first
    for r in range(r_lo, r_hi):
        for c in range(0, C, BLOCK_K):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), X_BYTES + W_BYTES)
            for j in range(POSITIONS):
                w = q + j - PAD_W
                row = ((p + r - PAD_H) * W + w) * N + n
                inside = (w >= 0) & (w < W)
                row = gl.where(inside, row, H * W * N)  # outside of x: zeros
                block = xs.index(stage * POSITIONS + j)
                tma.async_load(x_desc, [row, g * C + c], full.index(stage), block)
            for s in range(S):
                block = ws.index(stage * S + s)
                tail = w_tails.index(stage * S + s)
                if REVERSE:
                    row = (R * S - 1 - (r * S + s)) * K + k
                    tma.async_load(w_desc, [row, g * C + c], full.index(stage), block)
                    row += BLOCK_N
                    tma.async_load(w_tail_desc, [row, g * C + c], full.index(stage), tail)
                else:
                    row = (r * S + s) * C + c
                    column = g * K + k
                    tma.async_load(w_desc, [row, column], full.index(stage), block)
                    column += BLOCK_N
                    tma.async_load(w_tail_desc, [row, column], full.index(stage), tail)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _wait(accs, tails, OUTSTANDING: gl.constexpr, RUN: gl.constexpr):
    """Accumulators when all products but the last OUTSTANDING have ended."""
    ended = warpgroup_mma_wait(num_outstanding=OUTSTANDING, deps=accs + tails)
    return ended[:RUN], ended[RUN:]


@gluon.jit
def _in_flight(accs, RUN: gl.constexpr):
    """The same accumulators, as operands of asynchronous products."""
    result = ()
    for t in gl.static_range(RUN):
        result += (warpgroup_mma_init(accs[t]),)
    return result


@gluon.jit
def _zeros(BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, RUN: gl.constexpr, LAYOUT: gl.constexpr):
    result = ()
    for _ in gl.static_range(RUN):
        result += (gl.zeros([BLOCK_M, BLOCK_N], gl.float32, LAYOUT),)
    return result


@gluon.jit
def _position(
    xs, ws, w_tails, stage, accs, tails, j: gl.constexpr, X_LAYOUT: gl.constexpr, S: gl.constexpr,
    RUN: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """The products of a turn's block ``j`` of x: pixel t of the run needs tap j - t.

    They are started, and those of the block before are waited for.
    """
    x = xs.index(stage * (S + RUN - 1) + j).load(X_LAYOUT)
    more_accs = ()
    more_tails = ()
    for t in gl.static_range(RUN):
        acc = accs[t]
        tail = tails[t]
        if 0 <= j - t and j - t < S:
            w = ws.index(stage * S + j - t)
            w_tail = w_tails.index(stage * S + j - t)
            if REVERSE:
                w = w.permute((1, 0))
                w_tail = w_tail.permute((1, 0))
            acc = warpgroup_mma(x, w, acc, is_async=True)
            tail = warpgroup_mma(x, w_tail, tail, is_async=True)
        more_accs += (acc,)
        more_tails += (tail,)
    OUTSTANDING: gl.constexpr = 2 * (min(j, S - 1) - max(j - RUN + 1, 0) + 1)
    accs, tails = _wait(more_accs, more_tails, OUTSTANDING, RUN)
    return _in_flight(accs, RUN), _in_flight(tails, RUN)


@gluon.jit
def _store(
    acc, y_ptr, b_ptr, row, column, stride, HAS_BIAS: gl.constexpr, RELU: gl.constexpr,
):  # fmt: skip
    """Bias, ReLU, one rounding: a pixel's sums for BLOCK_M rows of y and the columns from one on."""
    LAYOUT: gl.constexpr = acc.type.layout
    BLOCK_M: gl.constexpr = acc.shape[0]
    BLOCK_N: gl.constexpr = acc.shape[1]
    ROWS: gl.constexpr = gl.BlockedLayout(  # 16 bytes of a thread, whole rows of a warp
        [1, 8], [256 // BLOCK_N, BLOCK_N // 8], [gl.num_warps(), 1], [1, 0]
    )
    if HAS_BIAS:
        offs_b = column + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
        acc += gl.load(b_ptr + offs_b).to(gl.float32)[None, :]
    if RELU:
        acc = gl.where(acc < 0, 0.0, acc)  # not a maximum, which would hide a NaN
    y = gl.convert_layout(acc.to(y_ptr.dtype.element_ty), ROWS)
    offs_m = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, ROWS))
    offs_n = column + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, ROWS))
    gl.store(y_ptr + offs_m.to(gl.int64)[:, None] * stride + offs_n[None, :], y)


@gluon.jit
def _multiply(
    b_ptr, y_ptr, xs, ws, w_tails, full, empty, p, q, n, g, k, r_lo, r_hi, N, Q,
    G: gl.constexpr, C: gl.constexpr, K: gl.constexpr, S: gl.constexpr, REVERSE: gl.constexpr,
    HAS_BIAS: gl.constexpr, RELU: gl.constexpr, RUN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The multiplying warps: the products of every turn, then the stores."""
    BLOCK_M: gl.constexpr = xs.shape[1]
    BLOCK_K: gl.constexpr = xs.shape[2]
    BLOCK_N: gl.constexpr = ws.shape[1 if REVERSE else 2]
    TAIL_N: gl.constexpr = w_tails.shape[1 if REVERSE else 2]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    TAIL_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, TAIL_N, 16])
    X_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    accs = _in_flight(_zeros(BLOCK_M, BLOCK_N, RUN, LAYOUT), RUN)
    tails = _in_flight(_zeros(BLOCK_M, TAIL_N, RUN, TAIL_LAYOUT), RUN)
    stage = 0
    phase = 0
    before = 0  # stage of the turn before
    for r in range(r_lo, r_hi):
        for c in range(0, C, BLOCK_K):
            mbarrier.wait(full.index(stage), phase)
            accs, tails = _position(
                xs, ws, w_tails, stage, accs, tails, 0, X_LAYOUT, S, RUN, REVERSE
            )
            mbarrier.arrive(empty.index(before), pred=(r > r_lo) | (c > 0))
            for j in gl.static_range(1, S + RUN - 1):
                accs, tails = _position(
                    xs, ws, w_tails, stage, accs, tails, j, X_LAYOUT, S, RUN, REVERSE
                )
            before = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
    accs, tails = _wait(accs, tails, 0, RUN)
    for t in gl.static_range(RUN):
        if q + t < Q:
            row = (p * Q + q + t) * N + n
            _store(accs[t], y_ptr, b_ptr, row, g * K + k, G * K, HAS_BIAS, RELU)
            _store(tails[t], y_ptr, b_ptr, row, g * K + k + BLOCK_N, G * K, HAS_BIAS, RELU)


@gluon.jit
def conv2d_relu_fwd_warp_specialized_kernel(
    x_desc,  # [H * W * N, G * C], blocks [128, BLOCK_K]
    w_desc,  # packed weight, blocks [BLOCK_K, BLOCK_N]; [BLOCK_N, BLOCK_K] of the reversed one
    w_tail_desc,  # the same of TAIL_N columns, the outputs that follow
    b_ptr,  # [G * K], read where HAS_BIAS
    y_ptr,  # [P, Q, N, G * K]
    N,
    H,
    W,
    P,
    Q,
    G: gl.constexpr,
    C: gl.constexpr,
    K: gl.constexpr,
    R: gl.constexpr,
    S: gl.constexpr,
    PAD_H: gl.constexpr,
    PAD_W: gl.constexpr,
    REVERSE: gl.constexpr,  # take the taps in reverse order: the input gradient
    HAS_BIAS: gl.constexpr,
    RELU: gl.constexpr,
    RUN: gl.constexpr,  # pixels side by side in a line
    STAGES: gl.constexpr,  # turns that are loaded at once
):
    wait_for_predecessor()
    POSITIONS: gl.constexpr = S + RUN - 1
    BLOCK_M: gl.constexpr = x_desc.block_shape[0]
    SIDE: gl.constexpr = 0 if REVERSE else 1
    COLUMNS: gl.constexpr = w_desc.block_shape[SIDE] + w_tail_desc.block_shape[SIDE]
    N_BLOCKS: gl.constexpr = K // COLUMNS
    pid = gl.program_id(0)
    g = gl.program_id(1)
    k = pid % N_BLOCKS * COLUMNS
    n = pid // N_BLOCKS % (N // BLOCK_M) * BLOCK_M
    run = pid // N_BLOCKS // (N // BLOCK_M)
    runs = (Q + RUN - 1) // RUN  # of a line
    p = (run // runs + PAD_H) % P  # lines that need every tap first
    q = run % runs * RUN
    r_lo = gl.maximum(PAD_H - p, 0)
    r_hi = gl.minimum(H + PAD_H - p, R)

    xs = gl.allocate_shared_memory(
        x_desc.dtype, [STAGES * POSITIONS] + x_desc.block_shape, x_desc.layout
    )
    ws = gl.allocate_shared_memory(w_desc.dtype, [STAGES * S] + w_desc.block_shape, w_desc.layout)
    w_tails = gl.allocate_shared_memory(
        w_desc.dtype, [STAGES * S] + w_tail_desc.block_shape, w_tail_desc.layout
    )
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    # The fetching warp needs few registers: 56 of a thread leave 224 for each that multiplies.
    gl.warp_specialize([
        (_multiply, (
            b_ptr, y_ptr, xs, ws, w_tails, full, empty, p, q, n, g, k, r_lo, r_hi, N, Q,
            G, C, K, S, REVERSE, HAS_BIAS, RELU, RUN, STAGES,
        )),
        (_fetch, (
            x_desc, w_desc, w_tail_desc, xs, ws, w_tails, full, empty, p, q, n, g, k, r_lo, r_hi,
            N, H, W, C, K, R, S, PAD_H, PAD_W, REVERSE, RUN, STAGES,
        )),
    ], [1], [56])  # fmt: skip
