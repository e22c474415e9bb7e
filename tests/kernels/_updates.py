"""Layers that apply their gradients in backward, against the rule written out in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import fastalex_kernels as fk
from fastalex_kernels import reference
from fastalex_kernels.conv2d_relu import pack_weight
from fastalex_kernels.momentum import MomentumUpdate, Updates

from . import _oracle as oracle
from ._oracle import Case, conv, linear, relative_error, tolerance

LR, MOMENTUM, DECAY = 0.25, 0.75, 0.0625  # each a float32 as it stands
RULES = ["paper", "torch"]

CASES = [
    conv("3x3", (2, 4, 6, 5), 6, 3, padding=1),
    conv("groups", (3, 16, 7, 5), 24, 5, padding=2, groups=2),
    conv("conv1", (2, 3, 31, 27), 16, 11, stride=4, padding=((0, 3), (0, 3))),
    conv("stride2", (3, 4, 8, 7), 6, 3, stride=2, padding=1),
    conv("without-bias", (2, 4, 5, 5), 6, 3, padding=1, bias=False),
    conv("first-layer", (2, 3, 6, 5), 6, 3, padding=1, frozen=("input",)),
    linear("odd", 5, 19, 23),
    linear("several-tiles", 130, 72, 136, p=0.3),
    linear("last", 16, 64, 40, relu=False, p=0.0),
    linear("without-bias", 4, 12, 30, bias=False),
    linear("first-layer", 4, 12, 30, frozen=("input",)),
]


@dataclass
class Made:
    """A layer's tensors: leaves, the updates of its parameters, and float64 twins of them."""

    input: torch.Tensor
    parameters: list[torch.Tensor]
    updates: Updates
    rate: torch.Tensor

    def wide(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Parameter and velocity in float64, by parameter."""
        found = [u for u in self.updates if u is not None]
        return [(u.parameter.detach().double(), u.velocity.double()) for u in found]

    def call(self, case: Case, module: Any = fk, **more: Any) -> torch.Tensor:
        return oracle.call(
            Case(case.name, case.op, case.shapes, case.arguments | more, seed=case.seed),
            module,
            [self.input, *self.parameters],
        )


def make(
    case: Case, dtype: torch.dtype, rule: str, device: str = "cpu", packed: bool = False
) -> Made:
    """Random tensors; ``packed`` lays a convolution's weight as its kernels read it."""
    x = oracle.make_inputs(case, dtype, device)[0]
    parameters = [t.detach() for t in oracle.make_inputs(case, torch.float32, device)[1:]]
    if packed:
        parameters[0] = pack_weight(parameters[0]).permute(3, 2, 0, 1)
    generator = torch.Generator().manual_seed(case.seed + 2)
    rate = torch.tensor([LR, MOMENTUM, DECAY], device=device)
    stride = case.arguments.get("stride", 1)
    updates: list[MomentumUpdate | None] = []
    for parameter in parameters:
        parameter.requires_grad_()
        values = torch.randn(parameter.shape, generator=generator)
        velocity = torch.empty_like(parameter.detach()).copy_(values)
        pack = partial(pack_weight, stride=stride) if parameter.dim() == 4 else torch.detach
        operand = None
        if dtype != torch.float32 or (parameter.dim() == 4 and stride > 1):
            shape = pack(parameter.detach()).shape
            operand = torch.empty(shape, dtype=dtype, device=device)
        updates.append(MomentumUpdate(parameter, velocity, rate, rule, operand, pack))
    return Made(x, parameters, Updates(*updates), rate)


def by_hand(
    rule: str, w: torch.Tensor, v: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The new parameter and velocity."""
    if rule == "paper":
        v = MOMENTUM * v - DECAY * LR * w - LR * g
        return w + v, v
    v = MOMENTUM * v + g + DECAY * w
    return w - LR * v, v


def check(
    case: Case, dtype: torch.dtype, rule: str, device: str = "cpu", packed: bool = False
) -> Made:
    """Two steps of a layer, each within the bounds of its gradients."""
    made = make(case, dtype, rule, device, packed)
    strides = [p.stride() for p in made.parameters]
    for _ in range(2):
        before = made.wide()
        output = made.call(case, update=made.updates)
        gradient = oracle.make_gradient(case, [made.input], output)
        # The products read what the parameters are in their dtype.
        narrow = [p.detach().to(dtype).double().requires_grad_() for p in made.parameters]
        x = made.input.detach().double().requires_grad_(made.input.requires_grad)
        expected = oracle.call(case, reference, [x, *narrow])
        expected.backward(gradient.double())
        made.input.grad = None
        output.backward(gradient)
        assert output.dtype == dtype
        errors = {"output": (relative_error(output, expected), 0)}
        lengths = oracle.reductions(case, output)
        if made.input.requires_grad:
            assert made.input.grad is not None
            errors["input"] = (relative_error(made.input.grad, x.grad), lengths["input"])
        for name, (w, v), wide, now in zip(
            ("weight", "bias"), before, narrow, made.wide(), strict=False
        ):
            for kind, value, ref in zip("wv", now, by_hand(rule, w, v, wide.grad), strict=True):
                errors[f"{kind} of {name}"] = (relative_error(value, ref), lengths[name])
        wrong = {n: e for n, (e, length) in errors.items() if not e <= tolerance(dtype, length)}
        assert not wrong, f"{case.name} in {dtype}: {wrong}"
        _check_left_behind(made, strides, narrow, dtype)
    return made


def _check_left_behind(
    made: Made, strides: list[Any], wide: list[torch.Tensor], dtype: torch.dtype
) -> None:
    """No gradient, memory as it lay, and copies and norms that belong to what is there."""
    assert all(p.grad is None for p in made.parameters)
    assert [p.stride() for p in made.parameters] == strides
    updates = [u for u in made.updates if u is not None]
    for update, reference_parameter in zip(updates, wide, strict=True):
        if update.operand is not None:
            expected = update.pack(update.parameter.detach()).to(dtype)
            assert torch.equal(update.operand, expected)
        assert update.squares is not None
        norm = update.squares.double().sum().sqrt()
        assert relative_error(norm, reference_parameter.grad.norm()) <= tolerance(dtype, 0)
