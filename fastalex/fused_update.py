"""Momentum updates inside the backward pass, for every layer whose kernels can apply them.

A weight is updated by the kernel that has its gradient in registers, so the gradient is neither
written nor read, and the copy that the next products read is written on the way. An optimizer that
is built over the same parameters goes on owning the velocities and the rates; its own step finds no
gradient and does nothing. The result is the optimizer's to rounding: float32 gradients agree with
it to a few units in the last place, narrow ones are better than its, which are rounded first.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from fastalex.layers import Conv2dReLU, Linear, LinearReLUDropout
from fastalex.model import AlexNet
from fastalex.optim import RATE, VELOCITY, PaperSGD, set_rates
from fastalex_kernels.conv2d_relu import pack_weight
from fastalex_kernels.momentum import MomentumUpdate, Updates


def lay_out(model: AlexNet) -> None:
    """Let the weights lie in memory as the kernels read them, before an optimizer sees them.

    Shapes and values stay; a convolution's weight [K, C, R, S] lies as [R, S, C, K], so that its
    gradient is applied along whole lines of memory.
    """
    for layer in model.modules():
        if isinstance(layer, Conv2dReLU) and layer.stride[0] == 1:
            layer.weight.data = pack_weight(layer.weight.data).permute(3, 2, 0, 1)


def fuse_updates(
    model: AlexNet, optimizer: torch.optim.Optimizer, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Apply gradients in backward instead of in ``optimizer.step``, wherever a layer can.

    Args:
        model: whole, or one tower of it; in training every backward pass updates it.
        optimizer: from ``fastalex.optim.build_optimizer`` over ``model``. Its velocities are the
            ones that change, and ``set_learning_rate`` steers the updates.
        dtype: that the products are made in, as autocast chooses it.

    Returns:
        Names of the parameters that are updated in backward; the optimizer updates the others.
    """
    set_rates(optimizer)
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    rule = "paper" if isinstance(optimizer, PaperSGD) else "torch"

    def update(parameter: nn.Parameter, stride: int = 1) -> MomentumUpdate:
        convolution = parameter.dim() == 4
        pack = partial(pack_weight, stride=stride) if convolution else _as_it_is
        operand = None
        if dtype != torch.float32 or stride > 1:
            operand = torch.empty_like(
                pack(parameter.detach()), dtype=dtype, memory_format=torch.contiguous_format
            )
        velocity = optimizer.state[parameter][VELOCITY]
        return MomentumUpdate(parameter, velocity, groups[parameter][RATE], rule, operand, pack)

    fused = []
    for name, layer in model.named_modules():
        if not _can(layer):
            continue
        assert layer.bias is not None
        stride = layer.stride[0] if isinstance(layer, Conv2dReLU) else 1
        layer.update = Updates(update(layer.weight, stride), update(layer.bias))
        fused += [f"{name}.weight", f"{name}.bias"]
    return fused


def _can(layer: nn.Module) -> Any:
    """Whether a layer's kernels apply its gradients."""
    if isinstance(layer, LinearReLUDropout):
        return layer.groups == 1
    return isinstance(layer, (Conv2dReLU, Linear))


def _as_it_is(parameter: torch.Tensor) -> torch.Tensor:
    return parameter


def gradient_norms(model: nn.Module) -> dict[str, torch.Tensor]:
    """The Euclidean norm of each parameter's last gradient, float64 scalars.

    torch sums a norm on a CPU one element after the other: in float32 that loses three digits over
    the 38 million of fc6.
    """
    found = {
        name: torch.linalg.vector_norm(p.grad, dtype=torch.float64)
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    for name, layer in model.named_modules():
        updates = getattr(layer, "update", None)
        for kind, update in zip(("weight", "bias"), updates or (), strict=False):
            if update is not None and update.squares is not None:
                found[f"{name}.{kind}"] = update.squares.sum(dtype=torch.float64).sqrt()
    return found
