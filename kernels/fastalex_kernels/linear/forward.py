"""Fully connected + bias + ReLU + dropout, forward and every gradient.

    y[m, n] = keep[m, n] / (1 - p) * relu(b[n] + sum_k x[m, k] w[n, k])

Bias, ReLU and dropout run on the accumulator before the one store. The mask comes from a counter
(see _philox), never from memory. One kernel does the three products, told apart by their strides:

    forward           y  [M, N] = x   [M, K] w [N, K]^T
    input gradient    dx [M, K] = dz  [M, N] w [N, K]
    weight gradient   dw [N, K] = dz^T [N, M] x [M, K]

A batch of 128 fills only a few tiles, so a long reduction is split over programs: each leaves
float32 partial sums, and a second small kernel adds them in order and runs the epilogue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from fastalex_kernels import aten
from fastalex_kernels.common import philox
from fastalex_kernels.common.arguments import (
    autocast,
    check_floating,
    check_like,
    interpretable,
    placed,
)
from fastalex_kernels.common.backend import interpreted, operator, use_triton
from fastalex_kernels.common.epilogue import epilogue_backward
from fastalex_kernels.common.launch import launch
from fastalex_kernels.common.reduce import sum_partials
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


@dataclass(frozen=True)
class _Epilogue:
    """What is done to sums: see ``matmul``."""

    bias: torch.Tensor | None = None
    relu: bool = False
    p: float = 0.0
    rng: torch.Tensor | None = None
    row_offset: int = 0
    feature_offset: int = 0
    mask: torch.Tensor | None = None

    def tensors(self, a: torch.Tensor) -> list[torch.Tensor]:
        """Bias, counter and mask, ``a`` in the place of what is not read."""
        return [a if x is None else x for x in (self.bias, self.rng, self.mask)]

    def scalars(self) -> tuple[float, float, int, int]:
        return self.p, 1.0 / (1.0 - self.p), self.row_offset, self.feature_offset

    def flags(self) -> dict[str, bool]:
        return {
            "HAS_BIAS": self.bias is not None,
            "RELU": self.relu,
            "DROPOUT": self.rng is not None,
            "MASK": self.mask is not None,
        }


def _multiply(
    a: torch.Tensor,
    w: torch.Tensor,
    tile: dict[str, int],
    out: torch.Tensor,
    epilogue: _Epilogue,
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


def _add_up(parts: torch.Tensor, y: torch.Tensor, epilogue: _Epilogue) -> None:
    """The epilogue on the sums of ``parts`` [parts, M, N]."""
    M, N = y.shape
    block_m, block_n = 8, 128
    grid = (triton.cdiv(N, block_n), triton.cdiv(M, block_m))
    launch(
        _finish_partials_kernel, grid, parts, *epilogue.tensors(y), y, len(parts), M, N,
        *epilogue.scalars(), **epilogue.flags(), BLOCK_M=block_m, BLOCK_N=block_n,
        counted=max(M, N),
    )  # fmt: skip


def matmul(
    a: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    relu: bool = False,
    p: float = 0.0,
    rng: torch.Tensor | None = None,
    row_offset: int = 0,
    feature_offset: int = 0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [M, N] = epilogue(a [M, K] @ w [K, N]) / (1 - p), either operand of any strides.

    ``mask`` [M, N], contiguous, is the output of a ReLU whose gradient y is: y is zero where it is.
    """
    (M, K), N = a.shape, w.shape[1]
    epilogue = _Epilogue(bias, relu, p, rng, row_offset, feature_offset, mask)
    y = a.new_empty((M, N))
    tile = _tile(a, w, M, N, K)
    split = _tuned_parts(_parts(tile, M, N, K), "linear parts", a, w, tile)
    if split == 1:
        _multiply(a, w, tile, y, epilogue)
        return y
    parts = y.new_empty((split, M, N), dtype=torch.float32)
    _multiply(a, w, tile, parts, _Epilogue())
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
        _multiply(x, self.w.t().chunk(_HALVES)[half], self._tile, partials, _Epilogue())

    def finish(self, **epilogue: Any) -> torch.Tensor:
        """y [M, N] of both halves; the arguments of ``matmul`` that follow the operands."""
        y = self.w.new_empty(self._partials.shape[1:])
        _add_up(self._partials, y, _Epilogue(**epilogue))
        return y


@operator("linear_relu_dropout")
def _linear_relu_dropout(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    p: float,
    relu: bool,
    rng: torch.Tensor | None,
    row_offset: int,
    feature_offset: int,
) -> torch.Tensor:
    bias = None if bias is None else bias.contiguous()
    rng = None if rng is None else rng.contiguous()
    return matmul(input, weight.t(), bias, relu, p, rng, row_offset, feature_offset)


@_linear_relu_dropout.register_fake
def _(input, weight, bias, p, relu, rng, row_offset, feature_offset):
    return input.new_empty((input.shape[0], weight.shape[0]))


@operator("linear_relu_dropout_backward")
def _linear_relu_dropout_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor | None,
    rng: torch.Tensor | None,
    p: float,
    row_offset: int,
    feature_offset: int,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """Those gradients of input, weight and bias that ``needs`` asks for."""
    need_x, need_w, need_b = needs
    dy = grad.contiguous()
    dz, sums = epilogue_backward(
        dy, output, need_dz=need_x or need_w, need_sums=need_b, p=p, rng=rng,
        row_offset=row_offset, feature_offset=feature_offset,
    )  # fmt: skip
    dz = dy if dz is None else dz
    gradients = []
    if need_x:
        gradients.append(matmul(dz, weight))
    if need_w:
        gradients.append(matmul(dz.t(), input))
    if sums is not None and bias is not None:
        gradients.append(sum_partials(sums, torch.empty_like(bias)))
    return gradients


@_linear_relu_dropout_backward.register_fake
def _(grad, input, weight, bias, output, rng, p, row_offset, feature_offset, needs):
    arguments = zip((input, weight, bias), needs, strict=True)
    return [x.new_empty(x.shape) for x, need in arguments if need and x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    input, weight, bias, p, relu, rng, row_offset, feature_offset = inputs
    # With ReLU the output is the mask. Without, the caller may advance rng before backward.
    kept_rng = None if relu or rng is None else rng.clone()
    ctx.save_for_backward(input, weight, bias, output if relu else None, kept_rng)
    ctx.dropout = (p, row_offset, feature_offset)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    gradients = _linear_relu_dropout_backward(grad, *ctx.saved_tensors, *ctx.dropout, needs)
    return (*placed(gradients, needs), None, None, None, None, None)


_linear_relu_dropout.register_autograd(_differentiate, setup_context=_save)


def _check(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    check_floating("input", input)
    check_like("weight", weight, input)
    if input.dim() != 2:
        raise ValueError(f"input: expected [N, in_features], got shape {tuple(input.shape)}")
    if weight.dim() != 2 or weight.shape[1] != input.shape[1]:
        raise ValueError(
            f"weight: expected [out_features, {input.shape[1]}], got shape {tuple(weight.shape)}"
        )
    if bias is not None:
        check_like("bias", bias, input)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def _check_dropout(
    input: torch.Tensor,
    features: int,
    p: float,
    rng: torch.Tensor | None,
    row_offset: int,
    feature_offset: int,
) -> None:
    """Check the arguments that say what is dropped of [rows of input, features]."""
    for name, offset, size in (
        ("row_offset", row_offset, input.shape[0]),
        ("feature_offset", feature_offset, features),
    ):
        if not isinstance(offset, int) or isinstance(offset, bool):
            raise TypeError(f"{name}: expected an int, got {offset!r}")
        if not 0 <= offset <= 2**31 - max(size, 1):
            raise ValueError(f"{name}: expected 0 to {2**31 - max(size, 1)}, got {offset}")
    if not isinstance(p, (int, float)) or isinstance(p, bool):
        raise TypeError(f"p: expected a number, got {p!r}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p: expected a probability in [0, 1), got {p!r}")
    if rng is None:
        return
    if not isinstance(rng, torch.Tensor) or rng.dtype != torch.int64:
        raise TypeError(f"rng: expected an int64 tensor (seed, offset), got {rng!r}")
    if rng.shape != (2,):
        raise ValueError(f"rng: expected shape (2,), got {tuple(rng.shape)}")
    if rng.device != input.device:
        raise ValueError(f"rng: expected device {input.device} as the input's, got {rng.device}")


def draw_rng(device: torch.device) -> torch.Tensor:
    """A fresh (seed, offset) from torch's generator for ``device``."""
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)


def linear_relu_dropout(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    p: float = 0.5,
    relu: bool = True,
    training: bool = True,
    rng: torch.Tensor | None = None,
    row_offset: int = 0,
    feature_offset: int = 0,
) -> torch.Tensor:
    """dropout(relu(input @ weight.T + bias)), differentiable in input, weight and bias.

    Whether element (m, n) is dropped depends on (seed, offset, row_offset + m, feature_offset + n)
    alone: one GPU, two towers and any split of a batch drop the same units.

    Args:
        input: [N, in_features], float32, bfloat16, float16 or float64, any strides.
        weight: [out_features, in_features], of the input's dtype and device.
        bias: [out_features] or None.
        p: probability that an element is dropped, in [0, 1); the kept are scaled by 1 / (1 - p).
        relu: whether negative values become zero.
        training: False drops nothing.
        rng: int64 tensor (seed, offset) on the input's device; None draws one from torch's
            generator.
        row_offset: this batch's first row in the whole batch.
        feature_offset: this layer's first feature in the whole layer.

    Returns:
        [N, out_features]. Sums are float32 and rounded once; float64 runs on ATen.

    Raises:
        TypeError, ValueError: naming the argument and what came.

    Source: P§4.2; the scaling in training is the same function as halving at test.
    """
    input, weight, bias = autocast(input, weight, bias)
    _check(input, weight, bias)
    _check_dropout(input, weight.shape[0], p, rng, row_offset, feature_offset)
    if not training or p == 0:
        p, rng = 0.0, None
    elif rng is None:
        rng = draw_rng(input.device)
    arguments = (p, relu, rng, row_offset, feature_offset)
    if not use_triton(input):
        return aten.linear_relu_dropout(input, weight, bias, *arguments)
    dtype = input.dtype
    input, weight, bias = interpretable(input, weight, bias)
    output: torch.Tensor = _linear_relu_dropout(input, weight, bias, *arguments)
    return output.to(dtype)


def dropout(
    input: torch.Tensor,
    p: float = 0.5,
    training: bool = True,
    rng: torch.Tensor | None = None,
    row_offset: int = 0,
    feature_offset: int = 0,
) -> torch.Tensor:
    """Dropout alone, with the mask of ``linear_relu_dropout``; input is [N, features]."""
    check_floating("input", input)
    if input.dim() != 2:
        raise ValueError(f"input: expected [N, features], got shape {tuple(input.shape)}")
    _check_dropout(input, input.shape[1], p, rng, row_offset, feature_offset)
    if not training or p == 0:
        return input
    rng = draw_rng(input.device) if rng is None else rng
    return aten.dropout(input, p, rng, row_offset, feature_offset)
