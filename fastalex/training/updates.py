"""What becomes of a layer's gradients in a training step: how its parameters change.

``FusedUpdate`` applies each gradient in the kernel that makes it. ``StoredGradients`` leaves it in
``parameter.grad`` for the optimizer, which is what a framework does, and what the fused form is
measured against.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from fastalex.model.layers import Conv2dReLU
from fastalex_kernels.common.epilogue import epilogue_backward
from fastalex_kernels.common.launch import call
from fastalex_kernels.common.parameters import Dropout
from fastalex_kernels.common.reduce import sum_partials
from fastalex_kernels.conv2d.arguments import depth_to_space_weight
from fastalex_kernels.conv2d.forward import pack_weight
from fastalex_kernels.linear.backward import fits, linear_backward_update
from fastalex_kernels.linear.forward import Epilogue, matmul
from fastalex_kernels.linear.update import linear_backward_weight_update
from fastalex_kernels.momentum import MomentumUpdate, Updates, columns, sum_updates

Tensor = torch.Tensor


def momentum_update(
    parameter: nn.Parameter,
    buffer: Tensor,
    rate: Tensor,
    rule: str,
    dtype: torch.dtype,
    layer: nn.Module | None,
    rng: Tensor | None = None,
) -> MomentumUpdate:
    """The update of a parameter of ``layer``, which has kernels, or else of None.

    The products of kernels read a copy where they need another dtype or another layout.
    """
    pack = operand = None
    copied = layer is not None and dtype != torch.float32
    if isinstance(layer, Conv2dReLU) and parameter.dim() > 1:
        pack = partial(pack_weight, stride=layer.stride[0])
        copied = copied or layer.stride[0] > 1
    if copied:
        w = parameter.detach()
        operand = torch.empty_like(w if pack is None else pack(w), dtype=dtype)
    return MomentumUpdate(parameter, buffer, rate, rule, operand, pack, rng)


class FusedUpdate:
    """Gradients are applied where they are made, and never stored."""

    def __init__(self, layer: nn.Module, updates: Updates) -> None:
        self.updates = updates
        self._stride = layer.stride[0] if isinstance(layer, Conv2dReLU) else 1

    def weight(self) -> Tensor:
        """What the products read."""
        return self.updates.weight.read()

    def bias(self) -> Tensor | None:
        return None if self.updates.bias is None else self.updates.bias.read()

    def convolution(self, partials: Tensor, bias_partials: Tensor) -> None:
        """Take partials of the packed weight's gradient [parts, R, S, C, K], and of the bias's."""
        sum_updates(self.updates, partials, bias_partials, self._stride)

    def linear(
        self, dz: Tensor, x: Tensor, p: float, mask: bool, half: int | None = None
    ) -> Tensor:
        """Take the factors of the weight's gradient, dz^T x / (1 - p); the gradient of x.

        Args:
            mask: whether a ReLU made x, whose backward pass is to be done, too.
            half: 0 or 1 where x is read by half of the weight's columns.
        """
        weight, bias = self.updates
        updates = Updates(weight, None if half == 1 else bias)
        if fits(dz, x, weight, half):
            return linear_backward_update(dz, x, updates, p, mask, half)
        dx = self._input_gradient(dz, x, p, mask, half)
        linear_backward_weight_update(dz, x, *updates, p=p, half=half)
        return dx

    def _input_gradient(
        self, dz: Tensor, x: Tensor, p: float, mask: bool, half: int | None
    ) -> Tensor:
        epilogue = Epilogue(dropout=Dropout(p), mask=x if mask else None)
        return matmul(dz, columns(self.weight(), half), epilogue)

    def torch(self, gradients: list[Tensor]) -> None:
        """Take whole gradients, in the order of the parameters."""
        for update, gradient in zip(self.updates, gradients, strict=False):
            assert update is not None
            update.apply(gradient)

    def parameters(self) -> list[Tensor]:
        return [update.parameter for update in self.updates if update is not None]

    def product(self, dz: Tensor, x: Tensor) -> None:
        """Take the factors of the weight's gradient, dz^T x, on a CPU."""
        self.updates.weight.apply_product(dz, x)
        if self.updates.bias is not None:
            self.updates.bias.apply(dz.sum(0))


class StoredGradients(FusedUpdate):
    """Gradients, of weight and bias, are left in ``parameter.grad`` for an optimizer: float32."""

    def __init__(self, layer: nn.Module, updates: Updates) -> None:
        super().__init__(layer, updates)
        self.gradients = [torch.empty_like(parameter) for parameter in self.parameters()]

    def attach(self) -> None:
        """Give the parameters their gradients, which an optimizer may have taken away."""
        for parameter, gradient in zip(self.parameters(), self.gradients, strict=True):
            parameter.grad = gradient

    def convolution(self, partials: Tensor, bias_partials: Tensor) -> None:
        packed = sum_partials(partials, partials.new_empty(partials.shape[1:]))
        weight, bias = self.gradients
        call(_copy_blocks, weight, packed, self._stride)
        sum_partials(bias_partials, bias)

    def linear(
        self, dz: Tensor, x: Tensor, p: float, mask: bool, half: int | None = None
    ) -> Tensor:
        weight, bias = self.gradients
        dx = self._input_gradient(dz, x, p, mask, half)
        call(columns(weight, half).copy_, matmul(dz.t(), x, Epilogue(dropout=Dropout(p))))
        if half == 1:
            return dx
        _, bias_partials = epilogue_backward(dz, None, need_dz=False, need_sums=True)
        assert bias_partials is not None
        sum_partials(bias_partials, bias)
        if p:
            call(bias.mul_, 1.0 / (1.0 - p))
        return dx

    def torch(self, gradients: list[Tensor]) -> None:
        for stored, gradient in zip(self.gradients, gradients, strict=True):
            stored.copy_(gradient)

    def product(self, dz: Tensor, x: Tensor) -> None:
        self.torch([dz.t() @ x, dz.sum(0)])


def _copy_blocks(out: Tensor, packed: Tensor, stride: int) -> None:
    out.copy_(depth_to_space_weight(packed, out.shape, (stride, stride)))
