"""A product of two matrices of any strides, as the kernels of the fully connected layer take it.

``product`` is the loop inside a kernel, ``operands`` what its caller hands over: descriptors for
the tensor memory accelerator where the target has one, pointers elsewhere.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common.arguments import aligned
from ..common.backend import has_tma
from ..common.blocks import load_block
from ..common.tuned import dot_precision


@triton.jit
def product(
    a_ptr,
    w_ptr,
    M,
    N,
    K,
    stride_a,
    stride_w,
    offs_m,
    offs_n,
    first,
    last,
    TMA: tl.constexpr,
    A_COLUMNS: tl.constexpr,
    W_COLUMNS: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 a[offs_m, first:last] @ w[first:last, offs_n]; arguments as of the kernel below."""
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_n = offs_n < N
    if TMA:
        m = tl.program_id(1) * BLOCK_M
        n = tl.program_id(0) * BLOCK_N
    else:
        wide_k = offs_k.to(tl.int64)
        if A_COLUMNS:
            a_ptrs = a_ptr + offs_m[:, None] + wide_k[None, :] * stride_a
        else:
            a_ptrs = a_ptr + offs_m.to(tl.int64)[:, None] * stride_a + offs_k[None, :]
        if W_COLUMNS:
            w_ptrs = w_ptr + offs_k[:, None] + offs_n.to(tl.int64)[None, :] * stride_w
        else:
            w_ptrs = w_ptr + wide_k[:, None] * stride_w + offs_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(first, last, BLOCK_K):
        if TMA:  # what lies outside is read as zero
            a = a_ptr.load([k, m]).T if A_COLUMNS else a_ptr.load([m, k])
            w = w_ptr.load([n, k]).T if W_COLUMNS else w_ptr.load([k, n])
        else:
            a_block = a_ptrs + (tl.cast(k, tl.int64) * stride_a if A_COLUMNS else k)
            w_block = w_ptrs + (k if W_COLUMNS else tl.cast(k, tl.int64) * stride_w)
            mask_k = offs_k < last - k
            a = load_block(a_block, mask_m, mask_k, EVEN_M, EVEN_K)
            w = load_block(w_block, mask_k, mask_n, EVEN_K, EVEN_N)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    return acc


def _unit_stride(x: Tensor) -> tuple[Tensor, int, bool]:
    """x with neighbours along one axis, the other axis's stride, and whether columns lie so."""
    if x.stride(1) != 1 and x.stride(0) != 1:
        x = x.contiguous()
    columns = x.stride(1) != 1
    return x, x.stride(1 if columns else 0), columns


def operands(
    a: Tensor, w: Tensor, tile: dict[str, int], split: int = 1
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """a [M, K] and w [K, N], each of any strides, as a kernel with ``product`` takes them.

    Returns:
        a, w, M, N, K and the two strides; and the constants of ``product``.
    """
    (M, K), N = a.shape, w.shape[1]
    (a, stride_a, a_columns), (w, stride_w, w_columns) = _unit_stride(a), _unit_stride(w)
    m, n, k = (tile[f"BLOCK_{axis}"] for axis in "MNK")
    tma = has_tma(a.device) and all(
        # Rows that share memory, of an expanded tensor, have no descriptor.
        x.element_size() == 2 and x.numel() > 0 and aligned(x) and stride > 0 and stride % 8 == 0
        for x, stride in ((a, stride_a), (w, stride_w))
    )
    constants = {
        "TMA": tma, "A_COLUMNS": a_columns, "W_COLUMNS": w_columns, "EVEN_M": M % m == 0,
        "EVEN_N": N % n == 0, "EVEN_K": K % (k * split) == 0,
        "PRECISION": dot_precision(a, "linear"), **tile,
    }  # fmt: skip
    given: tuple[Any, Any] = (a, w)
    if tma:
        a_block, w_block = [k, m] if a_columns else [m, k], [n, k] if w_columns else [k, n]
        given = (
            TensorDescriptor.from_tensor(a.t() if a_columns else a, a_block),
            TensorDescriptor.from_tensor(w.t() if w_columns else w, w_block),
        )
    return (*given, M, N, K, stride_a, stride_w), constants
