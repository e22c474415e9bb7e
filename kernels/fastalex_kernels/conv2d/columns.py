"""Input gradient of a convolution with few input channels: neighbouring pixels are columns.

    dx[h, w, n, c] = sum_{r, s, k} dz[h + top - r, w + left - s, n, k] weight[r, s, c, k]

With 48 channels a tile of one pixel multiplies 128 images by 64 columns, 16 of them padding, and
reads a block of dz for every tap. Here a program holds T neighbouring pixels of a line: for a block
of dz in column j, pixel w + t needs tap s = w + t + left - j. The taps of neighbouring pixels are
neighbours, and in the packed weight [R, S * C, G * K] T of them are T * C consecutive rows: the
columns of one product. A tap outside 0..S-1 is a row outside the tensor, which the tensor memory
accelerator reads as zero. T = 4 makes 192 columns of 48 channels, without padding.

Each pixel adds its taps in the order of the kernel with one pixel, and zeros before and after.
Zeros times a NaN or an infinity are NaN, so one in dz reaches every pixel of its program.

Layout: dz [P, Q, N, G * K], dx [H, W, N, G * C], HWNC in memory (see ``forward``).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common.dependent import wait_for_predecessor
from ..common.launch import launch
from ..common.layout import as_hwnc, empty_nchw
from ..conv2d.arguments import Padding
from ..conv2d.tiles import next_tap, tma_fits

_BLOCK_M, _BLOCK_N, _BLOCK_K = 128, 128, 64
_WARPS, _STAGES = 8, 4


@triton.jit
def _load_taps(desc, r, row, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A block [BLOCK_K, BLOCK_N] of the weight: ``row`` and the rows after it are the columns."""
    return desc.load([r, row, k]).reshape(BLOCK_N, BLOCK_K).T


@triton.jit
def _store_pixels(
    acc,
    dx_ptr,  # at row 0 of the first pixel, channel 0 of the group
    first_column: tl.constexpr,
    pixels,  # of the program that lie inside the image
    pixel_stride,
    GC: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store ``WIDTH`` columns of the sums: column t * C + c is channel c of pixel t."""
    column = first_column + tl.arange(0, WIDTH)
    pixel = column // C
    offs_c = tl.max_contiguous(tl.multiple_of(column % C, 8), 8)
    offs = tl.arange(0, BLOCK_M)[:, None] * GC + (pixel * pixel_stride + offs_c)[None, :]
    tl.store(dx_ptr + offs, acc.to(dx_ptr.dtype.element_ty), mask=(pixel < pixels)[None, :])


@triton.jit
def _conv2d_bwd_input_columns_kernel(
    dz_desc,  # [P * Q * N, G * K], blocks [BLOCK_M, BLOCK_K]
    w_desc,  # [R, S * C, G * K], blocks [1, BLOCK_N, BLOCK_K]
    w_tail_desc,  # the same in blocks [1, TAIL_N, BLOCK_K]
    dx_ptr,  # [H, W, N, G * C]
    N,
    H,
    W,
    P,
    Q,
    G: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    PIXELS: tl.constexpr,  # of a program, neighbours in a line
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,  # PIXELS * C = BLOCK_N + TAIL_N
    BLOCK_K: tl.constexpr,
):
    wait_for_predecessor()
    pid = tl.program_id(0)
    g = tl.program_id(1)
    blocks = N // BLOCK_M
    runs = (W + PIXELS - 1) // PIXELS
    n = pid % blocks * BLOCK_M
    w = pid // blocks % runs * PIXELS
    h = (pid // blocks // runs + TOP) % H  # lines that need every tap first
    pixels = tl.minimum(PIXELS, W - w)
    # Lines and columns of dz that some of these pixels need.
    i_lo, i_hi = tl.maximum(h + TOP - R + 1, 0), tl.minimum(h + TOP + 1, P)
    j_lo, j_hi = tl.maximum(w + LEFT - S + 1, 0), tl.minimum(w + pixels + LEFT, Q)
    steps = tl.maximum(i_hi - i_lo, 0) * tl.maximum(j_hi - j_lo, 0) * (K // BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TAIL_N > 0:
        acc_n = tl.zeros((BLOCK_M, TAIL_N), tl.float32)
    i = i_lo
    j = j_lo
    k = pid * 0
    for _ in range(steps):
        r = h + TOP - i
        row = (w + LEFT - j) * C  # of the first pixel's tap; negative where it has none
        a = dz_desc.load([(i * Q + j) * N + n, g * K + k])
        acc = tl.dot(a, _load_taps(w_desc, r, row, g * K + k, BLOCK_N, BLOCK_K), acc)
        if TAIL_N > 0:
            b = _load_taps(w_tail_desc, r, row + BLOCK_N, g * K + k, TAIL_N, BLOCK_K)
            acc_n = tl.dot(a, b, acc_n)
        i, j, k = next_tap(i, j, k, j_lo, j_hi, BLOCK_K, K)

    dx_ptr += ((h * W + w) * N + n).to(tl.int64) * (G * C) + g * C
    stride = N * (G * C)
    _store_pixels(acc, dx_ptr, 0, pixels, stride, G * C, C, BLOCK_M, BLOCK_N)
    if TAIL_N > 0:
        _store_pixels(acc_n, dx_ptr, BLOCK_N, pixels, stride, G * C, C, BLOCK_M, TAIL_N)


def pixels_as_columns(dz: Tensor, w: Tensor, groups: int) -> int:
    """Pixels of a program, 0 where the kernel with one pixel does as well or has to do."""
    (_, S, C, columns), N = w.shape, dz.shape[2]
    fits = tma_fits(groups, dz, w) and N % _BLOCK_M == 0 and columns // groups % _BLOCK_K == 0
    counts = [t for t in (2, 3, 4) if t <= S and t * C in (_BLOCK_N, _BLOCK_N * 3 // 2)]
    return counts[0] if fits and counts and C % 8 == 0 else 0


def conv2d_backward_input_columns(
    dz: Tensor, w: Tensor, size: tuple[int, int], padding: Padding, groups: int, pixels: int
) -> Tensor:
    """dx [N, G * C, *size], HWNC in memory, of dz [P, Q, N, G * K] and w [R, S, C, G * K]."""
    (P, Q, N, columns), (R, S, C, _), (H, W) = dz.shape, w.shape, size
    output = empty_nchw(dz, (N, groups * C, H, W))
    tail = pixels * C - _BLOCK_N
    rows, weights = dz.view(-1, columns), w.view(R, S * C, columns)
    launch(
        _conv2d_bwd_input_columns_kernel,
        (H * triton.cdiv(W, pixels) * (N // _BLOCK_M), groups),
        TensorDescriptor.from_tensor(rows, [_BLOCK_M, _BLOCK_K]),
        *(TensorDescriptor.from_tensor(weights, [1, n or _BLOCK_N, _BLOCK_K])
          for n in (_BLOCK_N, tail)),
        as_hwnc(output), N, H, W, P, Q, G=groups, C=C, K=columns // groups, R=R, S=S,
        TOP=padding[0][0], LEFT=padding[1][0], PIXELS=pixels, BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N,
        TAIL_N=tail, BLOCK_K=_BLOCK_K, num_warps=_WARPS, num_stages=_STAGES,
        counted=max(P * Q * N, H * W * N, pixels * N * groups * C),
    )  # fmt: skip
    return output
