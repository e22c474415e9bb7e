"""Gradient descent with momentum, applied by the kernel that makes the gradient.

    rule "paper"   v <- m v - lr (g + wd w)      w <- w + v
    rule "torch"   v <- m v + (g + wd w)         w <- w - lr v

A gradient that is applied where it is summed is never written nor read again: of the fully
connected layers, 59 of the net's 61 million parameters, that is 4 to 8 bytes a parameter. What is
left is the weight and its momentum buffer v, read and written in float32, and the copy of the
weight that the products of the next step read: 18 bytes.

The buffer of a fully connected weight may be bfloat16, which makes 14; the arithmetic stays
float32. To nearest, a change of v by less than half of its last place would be lost each time, so v
is rounded stochastically (Gupta et al., ICML 2015): 16 random bits are added below what bfloat16
keeps, and the rest is cut off. The mean of that is v. Convolutions' and biases' buffers, 4 % of the
net, stay float32: instructions limit their updates, not bytes.

Rates and step are in device memory, so that a captured graph follows them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .common.backend import use_triton
from .common.dependent import wait_for_predecessor
from .common.launch import launch
from .common.philox import draw_bits, load_rng, random_bits
from .common.reduce import blocks, sum_parts
from .common.threads import share

_ROWS = 128  # that a thread of a CPU updates at a time
_BLOCK = 1024  # of a row, that a program rounds
_NAN = tl.constexpr(0x7FC00000)

Tensor = torch.Tensor


def columns(w: Tensor, half: int | None) -> Tensor:
    """Half 0 or 1 of a matrix's columns, in its memory; all of them of None."""
    return w if half is None else w.chunk(2, 1)[half]


def _paper(w: Tensor, v: Tensor, g: Tensor, lr: Any, momentum: Any, decay: Any) -> None:
    v.mul_(momentum).sub_(lr * (g + decay * w))
    w.add_(v)


def _torch(w: Tensor, v: Tensor, g: Tensor, lr: Any, momentum: Any, decay: Any) -> None:
    v.mul_(momentum).add_(g + decay * w)
    w.sub_(lr * v)


# By name, the update of a weight and its momentum buffer in place, by torch's operators.
RULES = {"paper": _paper, "torch": _torch}


def round_stochastically(x: Tensor, rng: Tensor, out: Tensor, first: int = 0) -> None:
    """Write float32 x [rows, columns] to bfloat16 ``out``, up or down, so that its mean is x.

    What bfloat16 can hold, infinity and NaN stay.

    Args:
        x: some rows of what has a buffer, contiguous.
        rng: int64 [5], as ``random_bits`` takes it.
        out: of x's shape, contiguous.
        first: row of x's first one.
    """
    if use_triton(x):
        M, N = x.shape
        grid, share = (triton.cdiv(N, _BLOCK), M), 1 if N % 8 else 8
        launch(_round_kernel, grid, x, out, rng, first, N, share, _BLOCK, counted=max(M, N))
        return
    for rows, kept in zip(x.split(_ROWS), out.split(_ROWS), strict=True):
        whole = rows.view(torch.int32) + random_bits(rng, len(rows), x.shape[1], first)
        whole = torch.where(rows == rows, whole, _NAN.value)
        kept.copy_((whole >> 16).to(torch.int16).view(torch.bfloat16))
        first += len(rows)


@dataclass(eq=False)
class MomentumUpdate:
    """A parameter, and what a kernel needs to update it.

    Args:
        parameter: float32, changed in place; contiguous, or a convolution's weight in any order.
        buffer: the momentum buffer, float32 or with ``rng`` bfloat16, of the parameter's shape and
            strides, changed in place.
        rate: float32 [3] on the parameter's device: learning rate, momentum, weight decay.
        rule: one of ``RULES``.
        operand: what the products read in place of the parameter: a copy of it in their dtype and
            layout, written with it; None where they read the parameter itself.
        pack: makes of the parameter the layout that products read, where it is another.
        rng: what rounds the buffer of a weight of rows: int64 [5] on the parameter's device, as
            ``random_bits`` takes it.

    Attributes:
        squares: float32, whose sum is the squared norm of the last gradient; None before the first.

    Raises:
        ValueError: for another dtype, or memory that the kernels would take for contiguous.
    """

    parameter: torch.Tensor
    buffer: torch.Tensor
    rate: torch.Tensor
    rule: str = "torch"
    operand: torch.Tensor | None = None
    pack: Callable[[torch.Tensor], torch.Tensor] | None = None
    rng: torch.Tensor | None = None
    squares: torch.Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        w, v = self.parameter, self.buffer
        assert self.rule in RULES, self.rule
        assert (v.shape, v.stride()) == (w.shape, w.stride())
        assert v.dtype == (torch.float32 if self.rng is None else torch.bfloat16)
        assert self.rng is None or w.dim() == 2
        if w.dtype != torch.float32:
            raise ValueError(f"parameter: expected float32, got {w.dtype}")
        # The kernels take the strides of a convolution's weight, and of nothing else.
        if w.dim() != 4 and not w.is_contiguous():
            layout = f"shape {tuple(w.shape)} and strides {w.stride()}"
            raise ValueError(f"parameter: expected contiguous memory, got {layout}")

    def read(self) -> torch.Tensor:
        """What the products read."""
        return self._packed() if self.operand is None else self.operand

    def _packed(self) -> torch.Tensor:
        w = self.parameter.detach()
        return w if self.pack is None else self.pack(w)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the parameter, which something else changed, to where the products read it."""
        if self.operand is not None:
            self.operand.copy_(self._packed())

    @torch.no_grad()
    def load_buffer(self, values: torch.Tensor | None) -> None:
        """Go on with another momentum, None of zeros, in the memory that the kernels know."""
        self.buffer.zero_() if values is None else self.buffer.copy_(values)

    def written(self, programs: int, half: int | None = None) -> tuple[torch.Tensor, ...]:
        """What kernels write: parameter, buffer, operand (or again the parameter) and squares.

        ``half`` is 0 or 1 where two launches each update half of a matrix's columns.
        """
        w = self.parameter.detach()
        tensors = w, self.buffer, w if self.operand is None else self.operand
        if half is None:
            self.squares = self.rate.new_empty(programs)
            return *tensors, self.squares
        if self.squares is None or self.squares.shape != (2, programs):
            self.squares = self.rate.new_empty((2, programs))
        return *(columns(x, half) for x in tensors), self.squares[half]

    def rounding(self, columns: int) -> tuple[torch.Tensor, int]:
        """rng_ptr and ROUND of kernels: elements that share a draw; 0 where nothing is rounded.

        ``columns``, of a half or of all, are updated by a launch.
        """
        if self.rng is None:
            return self.rate, 0
        return self.rng, 1 if columns % 8 else 8

    @torch.no_grad()
    def apply(self, gradient: torch.Tensor) -> None:
        """The update by torch's operators, with a gradient of the parameter's shape."""
        g = gradient
        if g.stride() != self.buffer.stride():
            g = torch.empty_like(self.parameter).copy_(gradient)
        self._keep(torch.linalg.vector_norm(g).square().reshape(1))
        self._descend(self.parameter, self.buffer, g)
        self.refresh()

    @torch.no_grad()
    def apply_product(self, dz: torch.Tensor, x: torch.Tensor) -> None:
        """``apply(dz.t() @ x)`` on a CPU, rows by rows: their gradient stays in the cache."""

        def apply(first: int, w: Tensor, v: Tensor, columns: Tensor) -> Tensor:
            g = columns @ x
            square = g.view(-1).dot(g.view(-1))
            self._descend(w, v, g, first)
            return square

        parts = (a.split(_ROWS) for a in (self.parameter, self.buffer, dz.t()))
        self._keep(torch.stack(share(apply, range(0, dz.shape[1], _ROWS), *parts)))

    def _keep(self, squares: torch.Tensor) -> None:
        self.squares = squares if self.squares is None else self.squares.copy_(squares)

    def _descend(self, w: Tensor, v: Tensor, g: Tensor, first: int = 0) -> None:
        """The update of the rows from ``first`` on, or of all, by torch's operators."""
        if self.rng is not None:
            wide = v.float()
            RULES[self.rule](w, wide, g, *self.rate.unbind())
            round_stochastically(wide, self.rng, v, first)
            return
        if not w.is_cpu or not self.rate.numpy()[1]:  # torch's own needs momentum
            RULES[self.rule](w, v, g, *self.rate.unbind())
            return
        lr, momentum, decay = self.rate.numpy().tolist()
        if self.rule == "paper":
            g, lr, decay = g * -lr, -1.0, -lr * decay
        torch._fused_sgd_(
            [w], [g], [v], weight_decay=decay, momentum=momentum, lr=lr, dampening=0.0,
            nesterov=False, maximize=False, is_first_step=False,
        )  # fmt: skip


class Updates(NamedTuple):
    """The updates of a layer's two parameters."""

    weight: MomentumUpdate
    bias: MomentumUpdate | None = None


@triton.jit
def load_rate(rate_ptr):
    """Learning rate, momentum and weight decay."""
    return tl.load(rate_ptr), tl.load(rate_ptr + 1), tl.load(rate_ptr + 2)


@triton.jit
def momentum_step(w, v, g, rate, PAPER: tl.constexpr):
    """The new weight and momentum buffer, float32."""
    lr, momentum, decay = rate
    g += decay * w
    if PAPER:
        v = momentum * v - lr * g
        w += v
    else:
        v = momentum * v + g
        w -= lr * v
    return w, v


@triton.jit
def rounded(v, rng, row, first, ROUND: tl.constexpr):
    """v [M, N] as the buffer keeps it; ``row`` [M], ``first`` and ROUND are as in ``draw_bits``."""
    if ROUND:
        whole = v.to(tl.int32, bitcast=True) + draw_bits(rng, row, first, v.shape[1], ROUND)
        whole = tl.where(v == v, whole, _NAN)
        v = (whole >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return v


@triton.jit
def _round_kernel(
    x_ptr,  # float32 [M, N]
    out_ptr,  # bfloat16 [M, N]
    rng_ptr,  # int64 [5]
    first_row,
    N,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_predecessor()
    row, first = tl.program_id(1), tl.program_id(0) * BLOCK
    columns = first + tl.arange(0, BLOCK)
    offs, mask = row.to(tl.int64) * N + columns[None, :], (columns < N)[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    rows = first_row + row + tl.zeros((1,), tl.int32)
    tl.store(out_ptr + offs, rounded(x, load_rng(rng_ptr, ROUND), rows, first, ROUND), mask=mask)


@triton.jit
def update_by(
    g, w_ptr, v_ptr, operand_ptr, square_ptr, rate_ptr, at, mask, offs, inside,
    PAPER: tl.constexpr, HAS_OPERAND: tl.constexpr,
):  # fmt: skip
    """Update a parameter ``at`` some places, and its copy at ``offs``, by a block of its gradient.

    Where ``mask`` is False, g is zero and only the copy has a place, with a zero in it.
    """
    w = tl.load(w_ptr + at, mask=mask, other=0.0)
    v = tl.load(v_ptr + at, mask=mask, other=0.0)
    w, v = momentum_step(w, v, g, load_rate(rate_ptr), PAPER)
    tl.store(w_ptr + at, w, mask=mask)
    tl.store(v_ptr + at, v, mask=mask)
    if HAS_OPERAND:
        tl.store(operand_ptr + offs, w.to(operand_ptr.dtype.element_ty), mask=inside)
    tl.store(square_ptr, tl.sum(g * g))


@triton.jit
def _sum_update_bias(
    part_ptr, w_ptr, v_ptr, operand_ptr, square_ptr, rate_ptr, parts, numel,
    PAPER: tl.constexpr, HAS_OPERAND: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    offs = program * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    g = sum_parts(part_ptr, parts, numel, offs, PARTS, BLOCK)
    update_by(
        g, w_ptr, v_ptr, operand_ptr, square_ptr + program, rate_ptr, offs, mask, offs, mask,
        PAPER, HAS_OPERAND,
    )  # fmt: skip


@triton.jit
def _sum_update_kernel(
    part_ptr,  # float32 [parts, numel], in the order of the operand
    w_ptr,  # float32, element (k, c, r, s) at k * W_K + c * W_C + r * W_R + s * W_S where MAP
    v_ptr,  # float32, as w
    operand_ptr,  # [numel], written where HAS_OPERAND
    square_ptr,  # float32 [programs]
    rate_ptr,  # float32 [3]
    bias_part_ptr,  # the same of a bias, float32 [bias_parts, bias_numel] to begin with
    bias_w_ptr,
    bias_v_ptr,
    bias_operand_ptr,
    bias_square_ptr,
    bias_rate_ptr,
    parts,
    numel,
    bias_parts,
    bias_numel,
    PAPER: tl.constexpr,
    HAS_OPERAND: tl.constexpr,
    BIAS_HAS_OPERAND: tl.constexpr,
    MAP: tl.constexpr,  # the operand is [ceil(R / D), ceil(S / D), D, D, C, K], else it lies as w
    D: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    W_R: tl.constexpr,
    W_S: tl.constexpr,
    W_C: tl.constexpr,
    W_K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS_PROGRAMS: tl.constexpr,  # the first ones: they have many parts and take the longest
    BIAS_PARTS: tl.constexpr,
    BIAS_BLOCK: tl.constexpr,
):
    wait_for_predecessor()
    program = tl.program_id(0) - BIAS_PROGRAMS
    if program < 0:
        _sum_update_bias(
            bias_part_ptr, bias_w_ptr, bias_v_ptr, bias_operand_ptr, bias_square_ptr, bias_rate_ptr,
            bias_parts, bias_numel, PAPER, BIAS_HAS_OPERAND, BIAS_PARTS, BIAS_BLOCK,
        )  # fmt: skip
    else:
        offs = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = offs < numel
        g = sum_parts(part_ptr, parts, numel, offs, PARTS, BLOCK)
        at = offs
        mask = inside
        if MAP:
            COLUMNS: tl.constexpr = (S + D - 1) // D
            index = offs.to(tl.int32)  # a convolution's weight is far below 2^31
            c = index // K % C
            tap = index // (K * C)  # ((r' * COLUMNS + s') * D + i) * D + j
            r = tap // (D * D * COLUMNS) * D + tap // D % D
            s = tap // (D * D) % COLUMNS * D + tap % D
            mask = inside & (r < R) & (s < S)  # the rest of the last block of taps stays zero
            at = index % K * W_K + c * W_C + r * W_R + s * W_S
            g = tl.where(mask, g, 0.0)
        update_by(
            g, w_ptr, v_ptr, operand_ptr, square_ptr + program, rate_ptr, at, mask, offs, inside,
            PAPER, HAS_OPERAND,
        )  # fmt: skip


def sum_updates(
    updates: Updates,
    part: torch.Tensor | None,
    bias_part: torch.Tensor | None = None,
    stride: int = 1,
) -> None:
    """Add parts of gradients in order and update by the sums, both parameters in one launch.

    Args:
        updates: of weight and bias.
        part: float32 [parts, R', S', stride * stride * C, K] of the packed weight of a
            convolution's parameter [K, C, R, S]; None leaves the weight as it is.
        bias_part: float32 [parts, K], or None.
        stride: of space-to-depth.
    """
    pairs = zip((part, bias_part), updates, strict=True)
    present = [(p, update) for p, update in pairs if p is not None and update is not None]
    if not present:
        return
    (part, update), (bias_part, bias_update) = present[0], present[-1]
    tile, programs = _blocks_and_programs(part)
    written = bias_written = update.written(programs)
    bias_tile, bias_programs = tile, 0
    if bias_update is not update:
        bias_tile, bias_programs = _blocks_and_programs(bias_part)
        bias_written = bias_update.written(bias_programs)
    launch(
        _sum_update_kernel, (bias_programs + programs,),
        part, *written, update.rate, bias_part, *bias_written, bias_update.rate,
        part.shape[0], part[0].numel(), bias_part.shape[0], bias_part[0].numel(),
        PAPER=update.rule == "paper", HAS_OPERAND=update.operand is not None,
        BIAS_HAS_OPERAND=bias_update.operand is not None,
        **_order(update.parameter, stride), **tile,
        BIAS_PROGRAMS=bias_programs, **{f"BIAS_{name}": size for name, size in bias_tile.items()},
        counted=max(part.shape[0], bias_part.shape[0], part[0].numel() if part.dim() > 2 else 0),
    )  # fmt: skip


def _blocks_and_programs(part: torch.Tensor) -> tuple[dict[str, int], int]:
    numel = part[0].numel()
    tile = blocks(part.shape[0], numel)
    return tile, triton.cdiv(numel, tile["BLOCK"])


def _order(w: torch.Tensor, stride: int) -> dict[str, Any]:
    """How the kernel finds an element of the parameter from its place among the parts."""
    mapped = w.dim() == 4 and not (stride == 1 and w.permute(2, 3, 1, 0).is_contiguous())
    names = ("K", "C", "R", "S")
    sizes, strides = (w.shape, w.stride()) if mapped else ((1,) * 4, (1,) * 4)
    return {
        "MAP": mapped,
        "D": stride,
        **dict(zip(names, sizes, strict=True)),
        **{f"W_{name}": step for name, step in zip(names, strides, strict=True)},
    }
