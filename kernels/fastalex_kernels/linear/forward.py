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
from torch import Tensor

from ..common import philox
from ..common.backend import interpreted
from ..common.dependent import wait_for_predecessor
from ..common.launch import launch
from ..common.parameters import NO_DROPOUT, Dropout
from ..common.tuned import Tiles, cut, tile_entry, tuned
from ..linear.product import operands, product

# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages) by target and operand width.
_TILES = {
    ("sm_80", 16): (128, 64, 64, 4, 3),
    ("sm_90", 16): (128, 64, 64, 4, 4),
    ("sm_100", 16): (128, 64, 64, 4, 4),
    ("gfx942", 16): (128, 64, 64, 4, 2),
    ("other", 16): (128, 64, 64, 8, 3),
    ("other", 32): (64, 32, 32, 4, 2),  # 64 x 64 spills
    "interpreter": (1024, 1024, 1024, 4, 1),
}
_WIDE_TILES = {**_TILES, ("sm_90", 16): (128, 256, 64, 8, 4)}  # half the bytes through L2
_FILLED = 100  # wide tiles that occupy a GPU
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
    wait_for_predecessor()
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
    ALIGN: tl.constexpr,  # divides N
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    wait_for_predecessor()
    N = N // ALIGN * ALIGN
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


def product_tile(
    table: Tiles, x: Tensor, kernel: str, blocked: tuple[int, int, int], *sizes: int
) -> dict[str, int]:
    """A tile of ``table`` for a product of ``sizes``, cut to the M, N and K that are blocked."""
    *blocks, warps, stages = tile_entry(table, x, kernel, *sizes)
    cuts = {f"BLOCK_{a}": cut(b, n) for a, b, n in zip("MNK", blocks, blocked, strict=True)}
    return {**cuts, "num_warps": warps, "num_stages": stages}


class Epilogue(NamedTuple):
    """What is done to the sums [M, N] of a product before they are stored, in this order."""

    bias: Tensor | None = None  # [N], added
    relu: bool = False
    dropout: Dropout = NO_DROPOUT
    mask: Tensor | None = None  # [M, N], the output of a ReLU: the result is zero where this is

    def tensors(self, a: Tensor) -> list[Tensor]:
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


class _Product:
    """How a [M, K] @ w [K, N] is cut into programs; ``a`` and ``w`` may be parts of theirs."""

    def __init__(self, a: Tensor, w: Tensor) -> None:
        self.M, self.K, self.N = *a.shape, w.shape[1]
        self.sizes = (self.M, self.N, self.K, int(a.stride(1) != 1), int(w.stride(1) != 1))
        blocked = (self.M, self.N, self.K)
        wide = triton.cdiv(self.M, 128) * triton.cdiv(self.N, 256) >= _FILLED
        table = _WIDE_TILES if wide else _TILES
        self.tile = product_tile(table, a, "linear", blocked, *self.sizes)
        self.steps: int = triton.cdiv(self.K, self.tile["BLOCK_K"])
        self.blocks: tuple[int, int] = (
            triton.cdiv(self.N, self.tile["BLOCK_N"]), triton.cdiv(self.M, self.tile["BLOCK_M"])
        )  # fmt: skip

    def split(self, programs: int) -> int:
        """Parts of the reduction that give about so many programs, each of some length."""
        tiles = max(math.prod(self.blocks), 1)
        return max(1, min(programs // tiles, self.steps // 8, _MAX_SPLIT))

    def parts(self) -> int:
        """Parts of the reduction of a whole product."""
        split = 1 if interpreted() else self.split(_PROGRAMS)
        return split if split > 2 else 1  # halves save less than another launch and its bytes

    def tuned(self, parts: int, kernel: str, a: Tensor) -> int:
        """What was found to be better than ``parts``."""
        (best,) = tuned((parts,), a, kernel, *self.sizes, math.prod(self.blocks), self.steps)
        return best

    def multiply(self, a: Tensor, w: Tensor, out: Tensor, epilogue: Epilogue = _SUMS) -> None:
        """Into y [M, N], or into float32 sums [parts, M, N] of parts of K."""
        split = len(out) if out.dim() == 3 else 1
        (a_given, w_given, *sizes), constants = operands(a, w, self.tile, split)
        launch(
            _linear_relu_dropout_fwd_kernel, (*self.blocks, split), a_given, w_given,
            *epilogue.tensors(a), out, *sizes, *epilogue.scalars(), SPLIT=split,
            FINISH=out.dim() == 2, ALIGN=math.gcd(8, *sizes), **constants, **epilogue.flags(),
            counted=max(split * self.M, self.N, self.K),
        )  # fmt: skip


def _add_up(parts: Tensor, y: Tensor, epilogue: Epilogue) -> Tensor:
    """The epilogue on the sums of ``parts`` [parts, M, N], into y."""
    M, N = y.shape
    block_m, block_n = 8, 128
    grid = (triton.cdiv(N, block_n), triton.cdiv(M, block_m))
    launch(
        _finish_partials_kernel, grid, parts, *epilogue.tensors(y), y, len(parts), M, N,
        *epilogue.scalars(), **epilogue.flags(), ALIGN=math.gcd(8, N), BLOCK_M=block_m,
        BLOCK_N=block_n, counted=max(M, N),
    )  # fmt: skip
    return y


def matmul(a: Tensor, w: Tensor, epilogue: Epilogue = _SUMS) -> Tensor:
    """y [M, N] = epilogue(a [M, K] @ w [K, N]), either operand of any strides."""
    product, y = _Product(a, w), a.new_empty((a.shape[0], w.shape[1]))
    split = product.tuned(product.parts(), "linear parts", a)
    if split == 1:
        product.multiply(a, w, y, epilogue)
        return y
    parts = y.new_empty((split, *y.shape), dtype=torch.float32)
    product.multiply(a, w, parts)
    return _add_up(parts, y, epilogue)


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

    def __init__(self, x: Tensor, w: Tensor) -> None:
        self._w = w.t().chunk(_HALVES)
        self._product = _Product(x, self._w[0])
        each = self._product.split(_PROGRAMS // _HALVES)
        self._each = self._product.tuned(each, "linear half parts", x)
        shape = (_HALVES * self._each, len(x), len(w))
        self._partials = x.new_empty(shape, dtype=torch.float32)

    @staticmethod
    def gains(x: Tensor, w: Tensor) -> bool:
        """Whether the whole product is split, too: else partials are stored for this alone."""
        product = _Product(x, w.t().chunk(_HALVES)[0])
        product.steps = triton.cdiv(w.shape[1], product.tile["BLOCK_K"])
        return product.parts() > 1

    def add(self, x: Tensor, half: int) -> None:
        """Sum the products of ``half``, 0 or 1, of the columns."""
        partials = self._partials[half * self._each :][: self._each]
        self._product.multiply(x, self._w[half], partials)

    def finish(self, epilogue: Epilogue) -> Tensor:
        """y [M, N] of both halves."""
        y = self._w[0].new_empty(self._partials.shape[1:])
        return _add_up(self._partials, y, epilogue)
