"""Gradients applied where they are made, against the rule written out in float64.

A case is a layer: its input, its parameters and the gradient before its ReLU. The kernels that make
its parameters' gradients update them; float64 says what they should have become.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

import fastalex_kernels as kernels
from fastalex_kernels.common.epilogue import epilogue_backward
from fastalex_kernels.common.layout import as_hwnc
from fastalex_kernels.common.parameters import Dropout
from fastalex_kernels.common.tuned import dot_precision
from fastalex_kernels.conv2d.arguments import Padding, space_to_depth, spell_out
from fastalex_kernels.conv2d.forward import pack_weight
from fastalex_kernels.conv2d.weight import conv2d_relu_backward_weight
from fastalex_kernels.linear.backward import linear_backward_update
from fastalex_kernels.linear.forward import Epilogue, matmul
from fastalex_kernels.linear.update import linear_backward_weight_update
from fastalex_kernels.momentum import (
    MomentumUpdate,
    Updates,
    round_stochastically,
    sum_updates,
)
from fastalex_kernels.reference import relative_error, tolerance

from . import _oracle as oracle
from ._oracle import Case, conv, linear

LR, MOMENTUM, DECAY = 0.25, 0.75, 0.0625  # each a float32 as it stands
RULES = ["paper", "torch"]

CASES = [
    conv("3x3", (2, 4, 6, 5), 6, 3, padding=1),
    conv("groups", (3, 16, 7, 5), 24, 5, padding=2, groups=2),
    conv("conv1", (2, 3, 31, 27), 16, 11, stride=4, padding=((0, 3), (0, 3))),
    conv("stride2", (3, 4, 8, 7), 6, 3, stride=2, padding=1),
    linear("odd", 5, 19, 23),
    linear("several-tiles", 130, 72, 136, p=0.3),
    linear("last", 16, 64, 40, p=0.0),
]
# Strips and blocks of outputs that are whole and cut, images that fill a block and that do not.
ONE_PASS = [
    linear("strips", 128, 72, 136, p=0.3),
    linear("few-images", 37, 64, 200, p=0.0),
    linear("one-image", 1, 104, 40),
]
HALVED = [linear("strips", 128, 80, 136, p=0.3), linear("few-images", 37, 64, 200, p=0.0)]


@dataclass
class Made:
    """A layer's input and the updates of its weight and bias."""

    input: torch.Tensor
    updates: tuple[MomentumUpdate, MomentumUpdate]
    stride: int
    padding: Padding
    groups: int
    one_pass: bool = False  # the kernels make the input's gradient, too, before a ReLU below
    halved: bool = False  # half of a matrix's columns after the other, the second first

    def gradient(self, seed: int) -> torch.Tensor:
        """A gradient of the linear part, in the products' dtype."""
        output = self.expected(*(u.parameter.detach().double() for u in self.updates))
        values = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
        return values.to(self.input.device, self.input.dtype)

    def expected(self, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """The linear part in float64."""
        x = self.input.double()
        if x.dim() == 2:
            return F.linear(x, weight, bias)
        (top, bottom), (left, right) = self.padding
        padded = F.pad(x, (left, right, top, bottom))
        return F.conv2d(padded, weight, bias, self.stride, groups=self.groups)

    def apply(self, dz: torch.Tensor, p: float) -> torch.Tensor | None:
        """Run the kernels that make the gradients of ``dz`` / (1 - p)."""
        if self.halved:
            first, second = (x.contiguous() for x in self.input.chunk(2, 1))
            made = [self._linear(dz, second, p, 1), self._linear(dz, first, p, 0)]
            return torch.cat(made[::-1], 1) if self.one_pass else None
        if dz.dim() == 2:
            return self._linear(dz, self.input, p, None)
        weight, sides, x = self.updates[0].parameter, self.padding, self.input
        if self.stride > 1:
            size, strides = (weight.shape[2], weight.shape[3]), (self.stride, self.stride)
            x, sides = space_to_depth(x, size, strides, sides, self.groups), ((0, 0), (0, 0))
        R, S = pack_weight(weight.detach(), self.stride).shape[:2]
        hwnc = as_hwnc(dz)
        _, partials = epilogue_backward(hwnc.view(-1, hwnc.shape[-1]), None, need_sums=True)
        part = conv2d_relu_backward_weight(as_hwnc(x), hwnc, (R, S), sides, self.groups)
        sum_updates(Updates(*self.updates), part, partials, self.stride)
        return None

    def _linear(
        self, dz: torch.Tensor, x: torch.Tensor, p: float, half: int | None
    ) -> torch.Tensor | None:
        weight, bias = self.updates
        updates = Updates(weight, None if half == 0 else bias)
        if self.one_pass:
            return linear_backward_update(dz, x, updates, p, mask=True, half=half)
        return linear_backward_weight_update(dz, x, *updates, p=p, half=half)


def make(
    case: Case,
    dtype: torch.dtype,
    rule: str,
    device: str = "cpu",
    packed: bool = False,
    narrow: bool = False,
) -> Made:
    """Random tensors; ``packed`` puts a convolution's weight into the order its kernels read.

    With ``narrow`` the buffer of a weight of rows, the second tower's, is bfloat16.
    """
    x = oracle.make_inputs(case, dtype, device)[0].detach()
    parameters = [t.detach() for t in oracle.make_inputs(case, torch.float32, device)[1:]]
    if packed:
        parameters[0] = pack_weight(parameters[0]).permute(3, 2, 0, 1)
    generator = torch.Generator().manual_seed(case.seed + 2)
    rate = torch.tensor([LR, MOMENTUM, DECAY], device=device)
    padding, (stride, _) = spell_out(
        case.arguments.get("padding", 0), case.arguments.get("stride", 1)
    )
    updates = []
    for parameter in parameters:
        values = torch.randn(parameter.shape, generator=generator)
        buffer, rng = torch.empty_like(parameter).copy_(values), None
        if narrow and parameter.dim() == 2:
            buffer, place = buffer.bfloat16(), [2**40 + 1, 2**31, 3, len(parameter), 0]
            rng = torch.tensor(place, device=device)
        pack = partial(pack_weight, stride=stride) if parameter.dim() == 4 else torch.detach
        operand = None
        if dtype != torch.float32 or (parameter.dim() == 4 and stride > 1):
            operand = torch.empty(pack(parameter).shape, dtype=dtype, device=device)
        updates.append(MomentumUpdate(parameter, buffer, rate, rule, operand, pack, rng))
    weight, bias = updates
    return Made(x, (weight, bias), stride, padding, case.arguments.get("groups", 1))


def by_hand(
    rule: str, w: torch.Tensor, v: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The new parameter and momentum buffer."""
    if rule == "paper":
        v = MOMENTUM * v - DECAY * LR * w - LR * g
        return w + v, v
    v = MOMENTUM * v + g + DECAY * w
    return w - LR * v, v


def check(
    case: Case,
    dtype: torch.dtype,
    rule: str,
    device: str = "cpu",
    packed: bool = False,
    one_pass: bool = False,
    narrow: bool = False,
    halved: bool = False,
) -> None:
    """Two updates of a layer, each within the bounds of its gradients."""
    made = replace(make(case, dtype, rule, device, packed, narrow), halved=halved)
    if one_pass:
        made = replace(made, input=made.input.relu(), one_pass=True)
    strides = [u.parameter.stride() for u in made.updates]
    p = case.arguments.get("p", 0.0)
    for step in range(2):
        before = [(u.parameter.double(), u.buffer.double()) for u in made.updates]
        leaves = [w.clone().requires_grad_() for w, _ in before]
        dz = made.gradient(step)
        length = dz.numel() // dz.shape[1]
        bound = tolerance(dtype, length, dot_precision(dz, case.op))
        made.expected(*leaves).backward(dz.double() / (1 - p))
        dx = made.apply(dz, p)
        if dx is not None:  # of the weight before, as the products read it
            w = before[0][0].to(dtype).double()
            wanted_dx = torch.where(made.input > 0, dz.double() @ w / (1 - p), 0.0)
            assert relative_error(dx, wanted_dx) <= tolerance(dtype, len(w)), (case.name, dtype)
            assert torch.equal(dx == 0, wanted_dx.to(dtype) == 0)
        for update, leaf, (w, v) in zip(made.updates, leaves, before, strict=True):
            assert leaf.grad is not None
            wanted = by_hand(rule, w, v, leaf.grad)
            assert relative_error(update.parameter, wanted[0]) <= bound, (case.name, dtype)
            if update.rng is None:
                assert relative_error(update.buffer, wanted[1]) <= bound, (case.name, dtype)
            else:  # an error of float32 may send an element to its other neighbour
                kept = torch.empty_like(update.buffer)
                with kernels.backend("aten"):
                    round_stochastically(wanted[1].float(), update.rng, kept)
                assert float((update.buffer != kept).double().mean()) <= 1e-2, (case.name, dtype)
                assert relative_error(update.buffer, kept) <= 1e-3, (case.name, dtype)
            if update.operand is not None:
                assert torch.equal(update.operand, update.pack(update.parameter).to(dtype))
            assert update.squares is not None
            norm = update.squares.double().sum().sqrt()
            assert relative_error(norm, leaf.grad.norm()) <= bound
    assert [u.parameter.stride() for u in made.updates] == strides


def check_same_bits(case: Case, dtype: torch.dtype, device: str, narrow: bool = False) -> None:
    """One pass gives what two launches give, whose sums go in the same order, bit for bit."""
    one, two = (make(case, dtype, "paper", device, narrow=narrow) for _ in range(2))
    dz, p = one.gradient(0), case.arguments.get("p", 0.0)
    x = one.input.relu()
    weight = two.updates[0]
    weight.refresh()
    expected = matmul(dz, weight.read(), Epilogue(dropout=Dropout(p), mask=x))
    linear_backward_weight_update(dz, x, weight, p=p)
    dx = linear_backward_update(dz, x, Updates(one.updates[0]), p, mask=True)
    assert torch.equal(dx, expected)
    for name in ("parameter", "buffer", "operand"):
        assert torch.equal(getattr(one.updates[0], name), getattr(weight, name)), name
