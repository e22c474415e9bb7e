"""The forward kernel for an H100, in Gluon: one warp fetches, eight multiply.

    y[n, k, p, q] = relu(b[k] + sum_{c, r, s} x[n, c, p + r - top, q + s - left] w[k, c, r, s])

A program takes 128 images of a run of RUN neighbours in a line of the output, and all channels of
a group. Under row r of the weight, the RUN * S taps of these pixels touch S + RUN - 1 columns of
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

No interpreter runs Gluon, and no GPU has run this kernel. tests/kernels/_gluon_model.py runs its
source with the warps, copies, products and barriers as agents in random order.

Layout: x [H, W, N, G * C], y [P, Q, N, G * K], HWNC in memory (see ``forward``).
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..common.backend import gluon_mode, recorder, target
from ..common.dependent import wait_for_predecessor
from ..common.launch import launch, withdraw
from ..common.tuned import tuned

# Pixels of a run, by input and output channels of a group and the kernel's side: AlexNet's first
# two layers, on one GPU and on two, and the second one's input gradient. For others the estimate of
# the plain kernel is no longer, or the sums do not fit in the registers.
_RUNS = {(48, 96, 3): 3, (48, 48, 3): 4, (48, 128, 5): 2, (128, 48, 5): 4}
_BLOCK_K = 16  # a product's depth: of 32, copies of x in registers would leave too few
_SHARED_BYTES = 227 << 10
_MOST_STAGES = 8


@gluon.jit
def _fetch(
    x_desc, w_desc, w_tail_desc, xs, ws, w_tails, full, empty, p, q, n, g, r_lo, r_hi, N, H, W,
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
                    row = (R * S - 1 - (r * S + s)) * K
                    tma.async_load(w_desc, [row, g * C + c], full.index(stage), block)
                    row += BLOCK_N
                    tma.async_load(w_tail_desc, [row, g * C + c], full.index(stage), tail)
                else:
                    row = (r * S + s) * C + c
                    column = g * K
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
        result += (warpgroup_mma_init(accs[t]),)  # type: ignore[assignment]
    return result


@gluon.jit
def _zeros(BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, RUN: gl.constexpr, LAYOUT: gl.constexpr):
    result = ()
    for _ in gl.static_range(RUN):
        result += (gl.zeros([BLOCK_M, BLOCK_N], gl.float32, LAYOUT),)  # type: ignore[assignment]
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
        if j - t >= 0 and j - t < S:
            w = ws.index(stage * S + j - t)
            w_tail = w_tails.index(stage * S + j - t)
            if REVERSE:
                w = w.permute((1, 0))
                w_tail = w_tail.permute((1, 0))
            acc = warpgroup_mma(x, w, acc, is_async=True)
            tail = warpgroup_mma(x, w_tail, tail, is_async=True)
        more_accs += (acc,)  # type: ignore[assignment]
        more_tails += (tail,)  # type: ignore[assignment]
    OUTSTANDING: gl.constexpr = 2 * (min(j, S - 1) - max(j - RUN + 1, 0) + 1)
    accs, tails = _wait(more_accs, more_tails, OUTSTANDING, RUN)
    return _in_flight(accs, RUN), _in_flight(tails, RUN)


@gluon.jit
def _store(
    acc, y_ptr, b_ptr, row, column, stride, HAS_BIAS: gl.constexpr, RELU: gl.constexpr,
):  # fmt: skip
    """Bias, ReLU, one rounding: the sums of a pixel are stored from a row and a column on."""
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
    b_ptr, y_ptr, xs, ws, w_tails, full, empty, p, q, n, g, r_lo, r_hi, N, Q,
    G: gl.constexpr, C: gl.constexpr, K: gl.constexpr, S: gl.constexpr, REVERSE: gl.constexpr,
    HAS_BIAS: gl.constexpr, RELU: gl.constexpr, RUN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The multiplying warps: the products of every turn, then the stores."""
    BLOCK_M: gl.constexpr = xs.shape[1]
    BLOCK_K: gl.constexpr = xs.shape[2]
    BLOCK_N: gl.constexpr = ws.shape[1 if REVERSE else 2]
    TAIL_N: gl.constexpr = w_tails.shape[1 if REVERSE else 2]
    WARPS: gl.constexpr = gl.num_warps()
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    TAIL_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TAIL_N, 16])
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
            # The next copies into the stage come after the reads into registers, too.
            fence_async_shared()
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
            _store(accs[t], y_ptr, b_ptr, row, g * K, G * K, HAS_BIAS, RELU)
            _store(tails[t], y_ptr, b_ptr, row, g * K + BLOCK_N, G * K, HAS_BIAS, RELU)


@gluon.jit
def conv2d_relu_fwd_warp_specialized_kernel(
    x_desc,  # [H * W * N, G * C], blocks [128, BLOCK_K]
    w_desc,  # packed weight, blocks [BLOCK_K, BLOCK_N]; [BLOCK_N, BLOCK_K] of the reversed one
    w_tail_desc,  # the same in blocks of TAIL_N, the outputs that follow: K = BLOCK_N + TAIL_N
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
    gl.static_assert(STAGES >= 2)  # one is handed back when the next has come
    POSITIONS: gl.constexpr = S + RUN - 1
    BLOCK_M: gl.constexpr = x_desc.block_shape[0]
    pid = gl.program_id(0)
    g = gl.program_id(1)
    n = pid % (N // BLOCK_M) * BLOCK_M
    run = pid // (N // BLOCK_M)
    runs = (Q + RUN - 1) // RUN  # of a line
    BORDER: gl.constexpr = PAD_H if PAD_H > 0 else 0
    p = (run // runs + BORDER) % P  # lines that need every tap first
    q = run % runs * RUN
    r_lo = gl.maximum(PAD_H - p, 0)
    r_hi = gl.minimum(H + PAD_H - p, R)

    BLOCK_K: gl.constexpr = x_desc.block_shape[1]
    W_ROWS: gl.constexpr = w_desc.block_shape[0]
    W_COLUMNS: gl.constexpr = w_desc.block_shape[1]
    TAIL_ROWS: gl.constexpr = w_tail_desc.block_shape[0]
    TAIL_COLUMNS: gl.constexpr = w_tail_desc.block_shape[1]
    dtype: gl.constexpr = x_desc.dtype
    xs = gl.allocate_shared_memory(dtype, [STAGES * POSITIONS, BLOCK_M, BLOCK_K], x_desc.layout)
    ws = gl.allocate_shared_memory(dtype, [STAGES * S, W_ROWS, W_COLUMNS], w_desc.layout)
    w_tails = gl.allocate_shared_memory(
        dtype, [STAGES * S, TAIL_ROWS, TAIL_COLUMNS], w_tail_desc.layout
    )
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()  # before the copies signal a barrier
    # The fetching warp needs few registers: 56 of a thread leave 224 for each that multiplies.
    gl.warp_specialize([
        (_multiply, (
            b_ptr, y_ptr, xs, ws, w_tails, full, empty, p, q, n, g, r_lo, r_hi, N, Q,
            G, C, K, S, REVERSE, HAS_BIAS, RELU, RUN, STAGES,
        )),
        (_fetch, (
            x_desc, w_desc, w_tail_desc, xs, ws, w_tails, full, empty, p, q, n, g, r_lo, r_hi,
            N, H, W, C, K, R, S, PAD_H, PAD_W, REVERSE, RUN, STAGES,
        )),
    ], [1], [56])  # fmt: skip


def convolve(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    taps: tuple[tuple[int, int], tuple[int, int], bool],
    groups: int,
    relu: bool,
    counted: int,
) -> bool:
    """Write y [P, Q, N, G * K], where this kernel gains; whether it did.

    Args:
        x: [H, W, N, G * C] of 16 bits, with C that 16 divides.
        w: packed [R, S, C, G * K], of an input gradient [R, S, K, G * C].
        bias: [G * K] or None.
        taps: size of the output, padding above and to the left, whether taps are in reverse order.
        groups, relu: of the convolution.
        counted: as ``launch`` takes it.
    """
    (H, W, N, GC), (R, S, rows, columns), ((P, Q), pad, reverse) = x.shape, w.shape, taps
    C, K = GC // groups, rows if reverse else columns // groups
    run = _run(x, (N, P, Q, C, K, R, S, groups))
    if run == 1:
        return False
    block_n = 1 << (K - 1).bit_length() - 1  # 48 = 32 + 16, 128 = 64 + 64
    # Results go to memory through a block of shared memory, and the barriers take some.
    left = _SHARED_BYTES - 2 * 128 * block_n - (1 << 10)
    stages = min(_MOST_STAGES, left // (2 * _BLOCK_K * ((S + run - 1) * 128 + S * K)))
    described = _descriptors(x, w, (block_n, K - block_n), reverse)
    arguments = (*described, y if bias is None else bias, y, N, H, W, P, Q)
    options = {
        "G": groups, "C": C, "K": K, "R": R, "S": S, "PAD_H": pad[0], "PAD_W": pad[1],
        "REVERSE": reverse, "HAS_BIAS": bias is not None, "RELU": relu, "RUN": run,
        "STAGES": stages, "num_warps": 8, "num_stages": stages,
    }  # fmt: skip
    grid = (P * -(-Q // run) * (N // 128), groups)
    kernel = conv2d_relu_fwd_warp_specialized_kernel
    if recorder() is not None:  # who records launches compiles them later
        launch(kernel, grid, *arguments, **options, counted=counted)
        return True
    pointers = [(tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in arguments[3:5]]
    key = (y.device, *pointers, *arguments[5:], *options.values())
    with torch.cuda.device(y.device):
        first = key not in _usable
        if torch.cuda.is_current_stream_capturing() if first else not _usable[key]:
            return False
        if first:  # not the device: that would end a capture in another thread
            torch.cuda.current_stream().synchronize()
        try:
            launch(kernel, grid, *arguments, **options, counted=counted)
        except Exception as error:  # each version of Triton has its own
            withdraw()
            _usable[key] = False
            why = str(error).strip().partition("\n")[0]
            warnings.warn(f"Gluon's kernel fails, the plain one runs: {why}", stacklevel=2)
            return False
        if first:
            event = torch.cuda.Event()
            event.record()
            wait_for_first_launch(event)
            _usable[key] = True
    return True


def _run(x: Tensor, sizes: tuple[int, ...]) -> int:
    """Pixels of a run; 1 where the plain kernel is to run."""
    N, _, _, C, K, R, S, _ = sizes
    own = _RUNS.get((C, K, S), 1) if R == S and N % 128 == 0 else 1
    if own == 1 or target(x.device) != "sm_90" or gluon_mode() == "never":
        return 1
    return tuned((own,), x, "conv2d run", *sizes)[0]


def _descriptors(
    x: Tensor, w: Tensor, widths: tuple[int, int], reverse: bool
) -> tuple[TensorDescriptor, ...]:
    """x, and w in blocks of the first outputs and of those that follow."""
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    weights = w.view(-1, w.shape[3])

    def describe(matrix: Tensor, block: list[int]) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
        if recorder() is None:  # to leave the filters makes warnings that were shown come again
            return TensorDescriptor.from_tensor(matrix, block, layout)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a tensor without data it asks the address, too
            return TensorDescriptor.from_tensor(matrix, block, layout)

    return (
        describe(x.view(-1, x.shape[3]), [128, _BLOCK_K]),
        *(describe(weights, [n, _BLOCK_K] if reverse else [_BLOCK_K, n]) for n in widths),
    )


_usable: dict[tuple[Any, ...], bool] = {}  # by what decides the machine code, but an early start


def wait_for_first_launch(event: Any, limit: float = 20.0) -> None:
    """Wait until a kernel's first launch has ended; end the process if it does not.

    A kernel that waits for ever holds its GPU, and whoever waits for that: no exception would help.

    Args:
        event: recorded after the launch.
        limit: seconds; the longest launch at the net's sizes takes less than a thousandth of one.
    """
    deadline = time.monotonic() + limit
    while not event.query():
        if time.monotonic() > deadline and gluon_mode() != "wait":
            name = conv2d_relu_fwd_warp_specialized_kernel.fn.__name__
            print(
                f"{name} has not ended in {limit:g} s and holds the GPU: this process ends. "
                "FASTALEX_GLUON=never leaves the kernel out, FASTALEX_GLUON=wait waits for it",
                file=sys.stderr,
                flush=True,
            )
            os._exit(2)
        time.sleep(1e-3)
