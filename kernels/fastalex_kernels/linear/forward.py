"""The kernels of the fully connected layer: bias, ReLU and dropout with the product.

    y[m, n] = keep[m, n] / (1 - p) * relu(b[n] + sum_k x[m, k] w[n, k])

Bias, ReLU and dropout run on the accumulator before the one store. The mask comes from a counter
(philox.py), never from memory. One kernel does the three products, told apart by their strides:

    forward           y  [M, N] = x   [M, K] w [N, K]^T
    input gradient    dx [M, K] = dz  [M, N] w [N, K]
    weight gradient   dw [N, K] = dz^T [N, M] x [M, K]

A batch of 128 fills only a few tiles, so a long reduction is split over programs: each leaves
float32 partial sums, and a second small kernel adds them in order and runs the epilogue.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastalex_kernels.common import philox
from fastalex_kernels.common.backend import interpreted
from fastalex_kernels.common.launch import launch
from fastalex_kernels.common.parameters import NO_DROPOUT, Dropout
from fastalex_kernels.common.tuned import cut, tile_entry, tuned
from fastalex_kernels.linear.product import operands, product

# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages) by target and operand width.
_TILES = {
    ("sm_80", 16): (128, 64, 64, 4, 3),
    ("sm_90", 16): (128, 64, 64, 4, 4),
    ("sm_100", 16): (128, 64, 64, 4, 4),
    ("gfx942", 16): (128, 64, 64, 4, 2),
    ("other", 16): (128, 64, 64, 8, 3),
    ("other", 32): (64, 32, 32, 4, 2),  # 64 x 64 spills
    ("interpreter", 16): (1024, 1024, 1024, 4, 1),
    ("interpreter", 32): (1024, 1024, 1024, 4, 1),
}
_PROGRAMS = 256  # split the reduction until about this many programs run: two per SM
_MAX_SPLIT = 16
_HALVES = 2


@triton.jit
def _finish(
    acc,
    offs_m,
    offs_n,
    mask,
    N,
    b_ptr,
    rng_ptr,
    mask_ptrs,
    p,
    scale,
    row_offset,
    feature_offset,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASK: tl.constexpr,
):
    """The epilogue on a float32 block: bias, ReLU and dropout, or a ReLU's mask."""
    if HAS_BIAS:
        b = tl.load(b_ptr + offs_n, mask=offs_n < N, other=0.0)
        acc += b.to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)  # not tl.maximum, which would hide a NaN
    if MASK:
        kept = tl.load(mask_ptrs, mask=mask, other=0.0).to(tl.float32)
        acc = tl.where(kept <= 0, 0.0, acc)  # a NaN hands its gradient on, as in torch
    acc *= scale
    if DROPOUT:
        feature = tl.program_id(0) * acc.shape[1] + feature_offset
        acc = philox.drop(acc, rng_ptr, offs_m + row_offset, feature, p)
    return acc


@triton.jit
def _linear_relu_dropout_fwd_kernel(
    a_ptr,  # [M, K], element (m, k) at m * stride_a + k, or m + k * stride_a where A_COLUMNS
    w_ptr,  # [K, N], element (k, n) at k * stride_w + n, or k + n * stride_w where W_COLUMNS
    b_ptr,  # [N], read where HAS_BIAS
    rng_ptr,  # int64 [2], read where DROPOUT
    mask_ptr,  # [M, N], read where MASK
    y_ptr,  # [M, N] where FINISH, else float32 partial sums [SPLIT, M, N]
    M,
    N,
    K,
    stride_a,
    stride_w,
    p,
    scale,
    row_offset,
    feature_offset,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASK: tl.constexpr,  # y is the gradient of a ReLU's output: mask it
    SPLIT: tl.constexpr,
    FINISH: tl.constexpr,  # SPLIT is 1, and the sums are whole
    TMA: tl.constexpr,  # a_ptr and w_ptr are descriptors of the operands as they lie in memory
    A_COLUMNS: tl.constexpr,
    W_COLUMNS: tl.constexpr,
    EVEN_M: tl.constexpr,  # BLOCK_M divides M: no row is masked
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides every share of K
    ALIGN: tl.constexpr,  # divides M, N, K and the strides, which the compiler cannot see for 1000
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    M = M // ALIGN * ALIGN
    N = N // ALIGN * ALIGN
    K = K // ALIGN * ALIGN
    stride_a = stride_a // ALIGN * ALIGN
    stride_w = stride_w // ALIGN * ALIGN
    split = tl.program_id(2)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = (K + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT) * BLOCK_K
    first = split * share
    last = tl.minimum(first + share, K)
    acc = product(
        a_ptr, w_ptr, M, N, K, stride_a, stride_w, offs_m, offs_n, first, last, TMA, A_COLUMNS,
        W_COLUMNS, EVEN_M, EVEN_N, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    offs = (split * M + offs_m).to(tl.int64)[:, None] * N + offs_n[None, :]
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    if FINISH:
        acc = _finish(
            acc, offs_m, offs_n, mask, N, b_ptr, rng_ptr, mask_ptr + offs, p, scale, row_offset,
            feature_offset, HAS_BIAS, RELU, DROPOUT, MASK,
        )  # fmt: skip
    tl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _finish_partials_kernel(
    part_ptr,  # float32 [parts, M, N]
    b_ptr,  # [N], read where HAS_BIAS
    rng_ptr,  # int64 [2], read where DROPOUT
    mask_ptr,  # [M, N], read where MASK
    y_ptr,  # [M, N]
    parts,
    M,
    N,
    p,
    scale,
    row_offset,
    feature_offset,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    offs = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(parts):
        acc += tl.load(part_ptr + offs, mask=mask, other=0.0)
        part_ptr += tl.cast(M, tl.int64) * N
    acc = _finish(
        acc, offs_m, offs_n, mask, N, b_ptr, rng_ptr, mask_ptr + offs, p, scale, row_offset,
        feature_offset, HAS_BIAS, RELU, DROPOUT, MASK,
    )  # fmt: skip
    tl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def _tile(x: torch.Tensor, w: torch.Tensor, m: int, n: int, k: int) -> dict[str, int]:
    block_m, block_n, block_k, warps, stages = tile_entry(
        _TILES, x, "linear", m, n, k, int(x.stride(1) != 1), int(w.stride(1) != 1)
    )
    return {
        "BLOCK_M": cut(block_m, m),
        "BLOCK_N": cut(block_n, n),
        "BLOCK_K": cut(block_k, k),
        "num_warps": warps,
        "num_stages": stages,
    }


def _blocks(tile: dict[str, int], M: int, N: int) -> tuple[int, int]:
    return triton.cdiv(N, tile["BLOCK_N"]), triton.cdiv(M, tile["BLOCK_M"])


def _split(tile: dict[str, int], M: int, N: int, K: int, programs: int) -> int:
    """Parts of a reduction over K that give about so many programs, each of some length."""
    columns, rows = _blocks(tile, M, N)
    steps: int = triton.cdiv(K, tile["BLOCK_K"])
    return max(1, min(programs // max(columns * rows, 1), steps // 8, _MAX_SPLIT))


def _parts(tile: dict[str, int], M: int, N: int, K: int) -> int:
    """Parts of the reduction of a whole product."""
    if interpreted():
        return 1
    split = _split(tile, M, N, K, _PROGRAMS)
    return split if split > 2 else 1  # halves save less than another launch and its bytes


def _tuned_parts(
    own: int, kernel: str, a: torch.Tensor, w: torch.Tensor, tile: dict[str, int]
) -> int:
    (M, K), N = a.shape, w.shape[1]
    columns, rows = _blocks(tile, M, N)
    sizes = (M, N, K, int(a.stride(1) != 1), int(w.stride(1) != 1))
    steps = triton.cdiv(K, tile["BLOCK_K"])
    (parts,) = tuned((own,), a, kernel, *sizes, columns * rows, steps)
    return parts


class Epilogue(NamedTuple):
    """What is done to the sums [M, N] of a product before they are stored.

    Args:
        bias: [N], added.
        relu: whether negative values become zero.
        dropout: what is dropped, and the scale of the rest.
        mask: [M, N], contiguous, the output of a ReLU whose gradient the result is: it is zero
            where this is.
    """

    bias: torch.Tensor | None = None
    relu: bool = False
    dropout: Dropout = NO_DROPOUT
    mask: torch.Tensor | None = None

    def tensors(self, a: torch.Tensor) -> list[torch.Tensor]:
        """Bias, counter and mask, ``a`` in the place of what is not read."""
        return [a if x is None else x for x in (self.bias, self.dropout.rng, self.mask)]

    def scalars(self) -> tuple[float, float, int, int]:
        p, _, row_offset, feature_offset = self.dropout
        return p, 1.0 / (1.0 - p), row_offset, feature_offset

    def flags(self) -> dict[str, bool]:
        return {
            "HAS_BIAS": self.bias is not None,
            "RELU": self.relu,
            "DROPOUT": self.dropout.rng is not None,
            "MASK": self.mask is not None,
        }


_SUMS = Epilogue()


def _multiply(
    a: torch.Tensor,
    w: torch.Tensor,
    tile: dict[str, int],
    out: torch.Tensor,
    epilogue: Epilogue,
) -> None:
    """a [M, K] @ w [K, N] into y [M, N], or into float32 sums [parts, M, N] of parts of K."""
    M, N = a.shape[0], w.shape[1]
    split = len(out) if out.dim() == 3 else 1
    given = operands(a, w, tile, split)
    launch(
        _linear_relu_dropout_fwd_kernel, (*_blocks(tile, M, N), split), *given.args[:2],
        *epilogue.tensors(a), out, *given.args[2:], *epilogue.scalars(), SPLIT=split,
        FINISH=out.dim() == 2, ALIGN=math.gcd(8, *given.args[2:]), **given.flags,
        **epilogue.flags(), counted=max(split * M, N, w.shape[0]),
    )  # fmt: skip


def _add_up(parts: torch.Tensor, y: torch.Tensor, epilogue: Epilogue) -> None:
    """The epilogue on the sums of ``parts`` [parts, M, N]."""
    M, N = y.shape
    block_m, block_n = 8, 128
    grid = (triton.cdiv(N, block_n), triton.cdiv(M, block_m))
    launch(
        _finish_partials_kernel, grid, parts, *epilogue.tensors(y), y, len(parts), M, N,
        *epilogue.scalars(), **epilogue.flags(), BLOCK_M=block_m, BLOCK_N=block_n,
        counted=max(M, N),
    )  # fmt: skip


def matmul(a: torch.Tensor, w: torch.Tensor, epilogue: Epilogue = _SUMS) -> torch.Tensor:
    """y [M, N] = epilogue(a [M, K] @ w [K, N]), either operand of any strides."""
    (M, K), N = a.shape, w.shape[1]
    y = a.new_empty((M, N))
    tile = _tile(a, w, M, N, K)
    split = _tuned_parts(_parts(tile, M, N, K), "linear parts", a, w, tile)
    if split == 1:
        _multiply(a, w, tile, y, epilogue)
        return y
    parts = y.new_empty((split, M, N), dtype=torch.float32)
    _multiply(a, w, tile, parts, _SUMS)
    _add_up(parts, y, epilogue)
    return y


class HalvedProduct:
    """x [M, K] @ w [N, K]^T, made of one half of K and then of the other.

    A tower of two waits for the other one's half of what its next layer reads. The reduction is
    split over programs in any case, so those of the half that is there run meanwhile, and no byte
    more is moved. The partials are in the order of K and not of time, so that both towers add
    them up alike.

    Args:
        x: [M, K / 2], the first half of the columns or the second, for their shape.
        w: [N, K].
    """

    def __init__(self, x: torch.Tensor, w: torch.Tensor) -> None:
        (M, K), N = x.shape, w.shape[0]
        self.w = w
        self._tile = _tile(x, w.t().chunk(_HALVES)[0], M, N, K)
        each = _split(self._tile, M, N, K, _PROGRAMS // _HALVES)
        operand = w.t().chunk(_HALVES)[0]
        self._each = _tuned_parts(each, "linear half parts", x, operand, self._tile)
        shape = (_HALVES * self._each, M, N)
        self._partials = x.new_empty(shape, dtype=torch.float32)

    @staticmethod
    def gains(x: torch.Tensor, w: torch.Tensor) -> bool:
        """Whether the whole product is split, too: else partials are stored for this alone."""
        (M, K), N = x.shape, w.shape[0]
        tile = _tile(x, w.t().chunk(_HALVES)[0], M, N, K)
        return _parts(tile, M, N, _HALVES * K) > 1

    def add(self, x: torch.Tensor, half: int) -> None:
        """Sum the products of ``half``, 0 or 1, of the columns."""
        partials = self._partials[half * self._each :][: self._each]
        _multiply(x, self.w.t().chunk(_HALVES)[half], self._tile, partials, _SUMS)

    def finish(self, epilogue: Epilogue) -> torch.Tensor:
        """y [M, N] of both halves."""
        y = self.w.new_empty(self._partials.shape[1:])
        _add_up(self._partials, y, epilogue)
        return y
