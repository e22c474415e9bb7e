"""Convolution + bias + ReLU, forward and every gradient.

    y[n, k, p, q] = relu(b[k] + sum_{c, r, s} x[n, c, p + r - pad_top, q + s - pad_left] w[k, c, r, s])

Everything inside is HWNC (see _layout): x [H, W, N, G*C], y [P, Q, N, G*K], and the weight packed
as [R, S, C, G*K], for G groups of C input and K output channels. A row is one pixel of one image,
row = (p * Q + q) * N + n, and a tap (r, s) of a tile of rows is that tile of x shifted by
(r * W + s) * N rows. So:

* the forward kernel runs one flat loop over (r, s, c), and leaves out the taps that fall off the
  border for the whole tile, which zero padding would multiply;
* the input gradient is the same kernel, over dz with the taps reversed and the weight's channel
  axes exchanged;
* the weight gradient takes one tap by a block of channels and reduces over the rows for which the
  tap lies inside the image: contiguous runs in both operands, so nothing is gathered.

A stride is removed beforehand: space-to-depth by s turns R x R, stride s on C channels into
ceil(R/s) x ceil(R/s), stride 1 on s*s*C. For the first layer, 11 x 11 stride 4 on 3 channels
becomes 3 x 3 on 48, whose rows load 16 bytes at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from fastalex_kernels import _aten
from fastalex_kernels._epilogue import epilogue_backward, sum_partials
from fastalex_kernels._launch import (
    autocast,
    check_floating,
    check_like,
    dot_precision,
    interpreted,
    launch,
    target,
    use_triton,
)
from fastalex_kernels._layout import as_hwnc, as_nchw

Padding = tuple[tuple[int, int], tuple[int, int]]

# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages) by target and operand width; BLOCK_N and
# BLOCK_K shrink to the layer. What bounds a stage count is the target's shared memory:
# 227 KB on sm_90 and sm_100, 163 KB on sm_80, 99 KB on sm_86, sm_89 and sm_120, 64 KB on gfx942.
_FORWARD_TILES = {
    ("sm_80", 16): (128, 128, 64, 8, 3),
    ("sm_90", 16): (128, 128, 64, 8, 4),
    ("sm_100", 16): (128, 128, 64, 8, 4),
    ("gfx942", 16): (128, 128, 32, 8, 2),
    ("other", 16): (128, 128, 32, 8, 3),
    ("other", 32): (64, 64, 32, 4, 2),
}
# The weight gradient's M is input channels, its K is rows.
_WEIGHT_TILES = {
    ("sm_80", 16): (128, 64, 64, 8, 3),
    ("sm_90", 16): (128, 128, 64, 8, 3),
    ("sm_100", 16): (128, 128, 64, 8, 3),
    ("gfx942", 16): (64, 64, 32, 4, 2),
    ("other", 16): (128, 64, 32, 8, 2),
    ("other", 32): (64, 64, 32, 4, 2),
}
_WEIGHT_PROGRAMS = 528  # split the reduction until about this many programs run: four per SM
_INTERPRETER_TILE = (2048, 512, 512, 4, 1)  # each operation costs the same, whatever its size


def _tile(
    tiles: dict[tuple[str, int], tuple[int, ...]], x: torch.Tensor, m: int, n: int, k: int
) -> dict[str, int]:
    """The launch arguments of a tile for an m x n x k product: table entry, cut to the problem."""
    name = target(x.device)
    if name == "interpreter":
        block_m, block_n, block_k, warps, stages = _INTERPRETER_TILE
    else:
        bits = 8 * x.element_size()
        entry = tiles.get((name, bits)) or tiles[("other", bits)]
        block_m, block_n, block_k, warps, stages = entry
        while block_k > 16 and k % block_k:  # an even split of the reduction wastes no product
            block_k //= 2
    cut = lambda block, size: max(16, min(block, triton.next_power_of_2(size)))  # noqa: E731
    return {
        "BLOCK_M": cut(block_m, m),
        "BLOCK_N": cut(block_n, n),
        "BLOCK_K": cut(block_k, k),
        "num_warps": warps,
        "num_stages": stages,
    }


@triton.jit
def _conv2d_relu_fwd_kernel(
    x_ptr,  # [H, W, N, G * C]
    w_ptr,  # [R, S, ...]: element (tap, g, c, k) at tap * W_TAP + g * W_GROUP + c * W_C + k * W_K
    b_ptr,  # [G * K], read where HAS_BIAS
    y_ptr,  # [P, Q, N, G * K]
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
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    W_TAP: tl.constexpr,
    W_GROUP: tl.constexpr,
    W_C: tl.constexpr,
    W_K: tl.constexpr,
    REVERSE: tl.constexpr,  # take the taps in reverse order: the input gradient
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    ONE_PIXEL: tl.constexpr,  # BLOCK_M divides N: a tile is one output pixel, no row is masked
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_m = tl.program_id(0)
    g = tl.program_id(2)
    first = pid_m * BLOCK_M
    last = tl.minimum(first + BLOCK_M, P * Q * N) - 1
    p_first = first // (Q * N)
    p_last = last // (Q * N)
    q_first = first // N - p_first * Q
    q_last = last // N - p_last * Q
    if not ONE_PIXEL:  # a tile that spans rows of the image may hold any column
        q_first = tl.where(p_first == p_last, q_first, 0)
        q_last = tl.where(p_first == p_last, q_last, Q - 1)
    # The taps that touch the image for at least one row of the tile.
    r_lo = tl.maximum(PAD_H - p_last, 0)
    r_hi = tl.minimum(H + PAD_H - p_first, R)
    s_lo = tl.maximum(PAD_W - q_last, 0)
    s_hi = tl.minimum(W + PAD_W - q_first, S)
    CHUNKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    steps = tl.maximum(r_hi - r_lo, 0) * tl.maximum(s_hi - s_lo, 0) * CHUNKS

    offs_m = first + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < P * Q * N
    mask_n = offs_n < K
    # The row of x under tap (0, 0), and where it stands in the image (h, w).
    h = offs_m // (Q * N) - PAD_H
    w = offs_m // N - (h + PAD_H) * Q - PAD_W
    row = (h * W + w) * N + offs_m % N
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * (G * C) + (g * C + offs_k)[None, :]
    w_ptrs = w_ptr + g * W_GROUP + offs_k[:, None] * W_C + offs_n[None, :] * W_K

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    r = r_lo
    s = s_lo
    c = first * 0
    for _ in range(steps):
        shift = ((r * W + s) * N).to(tl.int64) * (G * C) + c
        tap = R * S - 1 - (r * S + s) if REVERSE else r * S + s
        mask_k = offs_k < C - c
        if ONE_PIXEL:
            if C % BLOCK_K == 0:
                a = tl.load(x_ptrs + shift)
            else:
                a = tl.load(x_ptrs + shift, mask=mask_k[None, :], other=0.0)
        else:
            inside = mask_m & (h + r >= 0) & (h + r < H) & (w + s >= 0) & (w + s < W)
            a = tl.load(x_ptrs + shift, mask=inside[:, None] & mask_k[None, :], other=0.0)
        b_ptrs = w_ptrs + (tap * W_TAP + c * W_C)
        if C % BLOCK_K == 0 and K % BLOCK_N == 0:
            b = tl.load(b_ptrs)
        else:
            b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        # Advance the odometer (r, s, c).
        c += BLOCK_K
        wrap = c >= C
        c = tl.where(wrap, 0, c)
        s = tl.where(wrap, s + 1, s)
        wrap = s == s_hi
        s = tl.where(wrap, s_lo, s)
        r = tl.where(wrap, r + 1, r)

    if HAS_BIAS:
        acc += tl.load(b_ptr + g * K + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)  # not tl.maximum, which would hide a NaN
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * (G * K) + (g * K + offs_n)[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _conv2d_bwd_weight_kernel(
    x_ptr,  # [H, W, N, G * C]
    dz_ptr,  # [P, Q, N, G * K]
    part_ptr,  # float32 [SPLIT, R * S, C, G * K]
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
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_ROWS: tl.constexpr,  # BLOCK_K divides N: every block of rows is full
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    M_BLOCKS: tl.constexpr = (C + BLOCK_M - 1) // BLOCK_M
    N_BLOCKS: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    split = tl.program_id(1)
    g = tl.program_id(2)
    tap = pid // (M_BLOCKS * N_BLOCKS)
    r = tap // S
    s = tap % S
    # The output pixels whose tap (r, s) lies inside the image: `run` rows in each line of them.
    p_lo = tl.maximum(PAD_H - r, 0)
    p_hi = tl.minimum(H + PAD_H - r, P)
    q_lo = tl.maximum(PAD_W - s, 0)
    q_hi = tl.minimum(W + PAD_W - s, Q)
    run = tl.maximum(q_hi - q_lo, 0) * N
    blocks = (run + BLOCK_K - 1) // BLOCK_K
    steps = tl.maximum(p_hi - p_lo, 0) * blocks
    share = (steps + SPLIT - 1) // SPLIT
    first = split * share
    last = tl.minimum(first + share, steps)

    offs_m = pid // N_BLOCKS % M_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid % N_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < C
    mask_n = offs_n < K
    x_ptrs = x_ptr + offs_k[None, :] * (G * C) + (g * C + offs_m)[:, None]  # x transposed
    dz_ptrs = dz_ptr + offs_k[:, None] * (G * K) + (g * K + offs_n)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    p = p_lo + first // tl.maximum(blocks, 1)
    j = first % tl.maximum(blocks, 1) * BLOCK_K
    for _ in range(first, last):
        x_row = ((p + r - PAD_H) * W + q_lo + s - PAD_W) * N + j
        dz_row = (p * Q + q_lo) * N + j
        mask_k = offs_k < run - j
        a_ptrs = x_ptrs + x_row.to(tl.int64) * (G * C)
        b_ptrs = dz_ptrs + dz_row.to(tl.int64) * (G * K)
        if EVEN_ROWS and C % BLOCK_M == 0:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if EVEN_ROWS and K % BLOCK_N == 0:
            b = tl.load(b_ptrs)
        else:
            b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        j += BLOCK_K
        wrap = j >= run
        j = tl.where(wrap, 0, j)
        p = tl.where(wrap, p + 1, p)

    row = ((split * (R * S) + tap) * C + offs_m).to(tl.int64)
    part_ptrs = part_ptr + row[:, None] * (G * K) + (g * K + offs_n)[None, :]
    tl.store(part_ptrs, acc, mask=mask_m[:, None] & mask_n[None, :])


def conv2d_relu_forward(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    padding: Padding,
    groups: int,
    relu: bool,
) -> torch.Tensor:
    """y [P, Q, N, G*K] of x [H, W, N, G*C] and the packed w [R, S, C, G*K]."""
    (R, S, C, GK), (top, bottom), (left, right) = w.shape, *padding
    H, W, N, _ = x.shape
    size = (H + top + bottom - R + 1, W + left + right - S + 1)
    strides = {"W_TAP": C * GK, "W_GROUP": GK // groups, "W_C": GK, "W_K": 1}
    return _convolve(x, w, bias, size, GK // groups, (top, left), groups, relu, False, strides)


def conv2d_relu_backward_input(
    dz: torch.Tensor, w: torch.Tensor, size: tuple[int, int], padding: Padding, groups: int
) -> torch.Tensor:
    """dx [H, W, N, G*C] of dz [P, Q, N, G*K]: the forward kernel with the weight's roles exchanged."""
    (R, S, C, GK), (top, _), (left, _) = w.shape, *padding
    strides = {"W_TAP": C * GK, "W_GROUP": GK // groups, "W_C": 1, "W_K": GK}
    pad = (R - 1 - top, S - 1 - left)
    return _convolve(dz, w, None, size, C, pad, groups, False, True, strides)


def _convolve(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    size: tuple[int, int],
    K: int,
    pad: tuple[int, int],
    groups: int,
    relu: bool,
    reverse: bool,
    strides: dict[str, int],
) -> torch.Tensor:
    H, W, N, GC = x.shape
    (P, Q), C = size, GC // groups
    y = x.new_empty((P, Q, N, groups * K))
    tile = _tile(_FORWARD_TILES, x, P * Q * N, K, C)
    grid = (triton.cdiv(P * Q * N, tile["BLOCK_M"]), triton.cdiv(K, tile["BLOCK_N"]), groups)
    launch(
        _conv2d_relu_fwd_kernel,
        grid,
        x,
        w,
        x if bias is None else bias,
        y,
        N,
        H,
        W,
        P,
        Q,
        G=groups,
        C=C,
        K=K,
        R=w.shape[0],
        S=w.shape[1],
        PAD_H=pad[0],
        PAD_W=pad[1],
        REVERSE=reverse,
        HAS_BIAS=bias is not None,
        RELU=relu,
        ONE_PIXEL=N % tile["BLOCK_M"] == 0,
        PRECISION=dot_precision(x.dtype),
        **strides,
        **tile,
    )
    return y


def conv2d_relu_backward_weight(
    x: torch.Tensor, dz: torch.Tensor, kernel_size: tuple[int, int], padding: Padding, groups: int
) -> torch.Tensor:
    """dw, packed [R, S, C, G*K], of x [H, W, N, G*C] and dz [P, Q, N, G*K]."""
    (H, W, N, GC), (P, Q, _, GK), (R, S) = x.shape, dz.shape, kernel_size
    C, K = GC // groups, GK // groups
    tile = _tile(_WEIGHT_TILES, x, C, K, N if N % 16 == 0 else 64)
    programs = R * S * triton.cdiv(C, tile["BLOCK_M"]) * triton.cdiv(K, tile["BLOCK_N"])
    steps = P * triton.cdiv(Q * N, tile["BLOCK_K"])
    split = 1
    if not interpreted():
        split = max(1, min(_WEIGHT_PROGRAMS // (programs * groups), steps // 4))
    part = x.new_empty((split, R, S, C, GK), dtype=torch.float32)
    launch(
        _conv2d_bwd_weight_kernel,
        (programs, split, groups),
        x,
        dz,
        part,
        N,
        H,
        W,
        P,
        Q,
        G=groups,
        C=C,
        K=K,
        R=R,
        S=S,
        PAD_H=padding[0][0],
        PAD_W=padding[1][0],
        SPLIT=split,
        EVEN_ROWS=N % tile["BLOCK_K"] == 0,
        PRECISION=dot_precision(x.dtype),
        **tile,
    )
    return sum_partials(part, x.new_empty(part.shape[1:]))


class Conv2dReLUFunction(torch.autograd.Function):
    """conv2d_relu at stride 1 on Triton kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        padding: Padding,
        groups: int,
        relu: bool,
    ) -> torch.Tensor:
        x = as_hwnc(input)
        w = weight.permute(2, 3, 1, 0).contiguous()
        output = as_nchw(conv2d_relu_forward(x, w, bias, padding, groups, relu))
        ctx.save_for_backward(x, w, bias, output if relu else None)
        ctx.padding, ctx.groups = padding, groups
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w, bias, output = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        dy = as_hwnc(grad)
        dz, db = epilogue_backward(
            dy.view(-1, dy.shape[-1]),
            None if output is None else as_hwnc(output).view(-1, dy.shape[-1]),
            need_dz=need_x or need_w,
            bias=bias if need_b else None,
        )
        dx = dw = None
        if dz is not None:
            dz = dz.view(dy.shape)
        if need_x:
            dx = as_nchw(conv2d_relu_backward_input(dz, w, x.shape[:2], ctx.padding, ctx.groups))
        if need_w:
            dw = conv2d_relu_backward_weight(x, dz, w.shape[:2], ctx.padding, ctx.groups)
            dw = dw.permute(3, 2, 0, 1)
        return dx, dw, db, None, None, None


def _space_to_depth(
    input: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: Padding,
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same convolution at stride 1 and padding 0, over blocks of ``stride`` pixels.

    Differentiable torch operations, so the gradients of input and weight pass through them.
    """
    (N, GC, H, W), (GK, C, R, S), (sh, sw) = input.shape, weight.shape, stride
    (top, bottom), (left, right) = padding
    P, Q = (H + top + bottom - R) // sh + 1, (W + left + right - S) // sw + 1
    rows, columns = -(-R // sh), -(-S // sw)
    height, width = P + rows - 1, Q + columns - 1
    x = F.pad(input, (left, width * sw - W - left, top, height * sh - H - top))
    x = x.reshape(N, groups, C, height, sh, width, sw).permute(3, 5, 0, 1, 4, 6, 2)
    w = F.pad(weight, (0, columns * sw - S, 0, rows * sh - R))
    w = w.reshape(GK, C, rows, sh, columns, sw).permute(2, 4, 3, 5, 1, 0)
    return (
        as_nchw(x.reshape(height, width, N, groups * sh * sw * C)),
        w.reshape(rows, columns, sh * sw * C, GK).permute(3, 2, 0, 1),
    )


def _normalise(padding: Any, stride: Any) -> tuple[Padding, tuple[int, int]]:
    """Spell out the accepted forms of padding and stride, or say what is wrong with them."""
    integer = lambda v: isinstance(v, int) and not isinstance(v, bool)  # noqa: E731
    pair = (stride, stride) if integer(stride) else stride
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(map(integer, pair))):
        raise TypeError(f"stride: expected an int or (height, width), got {stride!r}")
    if min(pair) < 1:
        raise ValueError(f"stride: expected at least 1, got {stride!r}")
    sides = (padding, padding) if integer(padding) else padding
    if isinstance(sides, (tuple, list)) and len(sides) == 2:
        sides = tuple(
            (v, v) if integer(v) else tuple(v) if isinstance(v, (tuple, list)) else v for v in sides
        )
        if all(isinstance(v, tuple) and len(v) == 2 and all(map(integer, v)) for v in sides):
            if min(min(v) for v in sides) < 0:
                raise ValueError(f"padding: expected no negative value, got {padding!r}")
            return sides, (pair[0], pair[1])  # type: ignore[return-value]
    raise TypeError(
        "padding: expected an int, (height, width) or ((top, bottom), (left, right)), "
        f"got {padding!r}"
    )


def _check(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: Padding,
    groups: int,
) -> None:
    check_floating("input", input)
    check_like("weight", weight, input)
    if input.dim() != 4:
        raise ValueError(f"input: expected [N, C, H, W], got shape {tuple(input.shape)}")
    if weight.dim() != 4 or min(weight.shape) < 1:
        raise ValueError(
            f"weight: expected [out, in / groups, height, width], got shape {tuple(weight.shape)}"
        )
    if not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"groups: expected a divisor of the {weight.shape[0]} output channels, got {groups!r}"
        )
    if input.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"input: expected {weight.shape[1] * groups} channels "
            f"(weight {tuple(weight.shape)}, groups {groups}), got {input.shape[1]}"
        )
    if bias is not None:
        check_like("bias", bias, input)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, size, kernel, sides in zip(
        ("height", "width"), input.shape[2:], weight.shape[2:], padding, strict=True
    ):
        if size + sum(sides) < kernel:
            raise ValueError(
                f"input: {name} {size} with padding {sides} is below the kernel's {kernel}"
            )


def conv2d_relu(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | Padding = 0,
    groups: int = 1,
    relu: bool = True,
) -> torch.Tensor:
    """Convolution + bias + ReLU in one pass, differentiable in input, weight and bias.

        relu(bias[k] + sum_{c, r, s} input[n, c, p * stride + r - top, q * stride + s - left] weight[k, c, r, s])

    Args:
        input: [N, C, H, W], float32, bfloat16, float16 or float64, any strides.
        weight: [K, C / groups, R, S], of the input's dtype and device.
        bias: [K] or None.
        stride: pixels between outputs, an int or (height, width).
        padding: zeros around the image: an int, (height, width), or ((top, bottom), (left, right)).
        groups: input and output channels are split into this many independent groups.
        relu: whether negative outputs become zero.

    Returns:
        [N, K, P, Q] with P = (H + top + bottom - R) // stride + 1, and Q likewise. Sums are
        float32 and rounded once; float64 runs on ATen.

    Raises:
        TypeError: for a wrong type or dtype.
        ValueError: for a wrong shape, device, or a value out of range.
    """
    sides, strides = _normalise(padding, stride)
    input, weight, bias = autocast(input, weight, bias)
    _check(input, weight, bias, sides, groups)
    if not use_triton(input):
        return _aten.conv2d_relu(input, weight, bias, strides, sides, groups, relu)
    if input.dtype == torch.bfloat16 and interpreted():
        # The interpreter computes bfloat16 on its raw bits: do as a GPU does, sum in float32.
        b = None if bias is None else bias.float()
        return conv2d_relu(input.float(), weight.float(), b, strides, sides, groups, relu).to(
            input.dtype
        )
    if strides != (1, 1):
        input, weight = _space_to_depth(input, weight, strides, sides, groups)
        sides = ((0, 0), (0, 0))
    return Conv2dReLUFunction.apply(input, weight, bias, sides, groups, relu)
