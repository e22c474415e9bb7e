"""Layers of AlexNet as modules: torch's parameters, fastalex_kernels' functions.

A fused layer is a subclass of the torch layer whose parameters it holds, so that state dicts,
``isinstance`` and initialisation loops see what they expect.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastalex_kernels as kernels

Sides = tuple[tuple[int, int], tuple[int, int]]  # ((top, bottom), (left, right))


class Conv2dReLU(nn.Conv2d):
    """``torch.nn.Conv2d``, and ReLU unless ``relu`` is False.

    With ``ceil_mode`` the number of outputs is rounded up, 1 + ceil((size - kernel) / stride):
    zeros are added at the bottom and right until the last window is full.

    Source: S:layer.py:1004 for the ceil.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        ceil_mode: bool = False,
        relu: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups)
        self.ceil_mode = ceil_mode
        self.relu = relu

    def _span(self, size: int) -> tuple[int, int]:
        """Where the last window of an axis may begin, and the zeros that complete it."""
        span = size + 2 * int(self.padding[0]) - self.kernel_size[0]
        return span, -span % self.stride[0] if self.ceil_mode and span >= 0 else 0

    def output_size(self, size: int) -> int:
        """Outputs along an axis of ``size`` pixels."""
        return sum(self._span(size)) // self.stride[0] + 1

    def sides(self, height: int, width: int) -> Sides:
        """Zeros around images of this size."""
        pad = int(self.padding[0])
        return (pad, pad + self._span(height)[1]), (pad, pad + self._span(width)[1])

    def forward(self, input: Tensor) -> Tensor:
        sides, groups = self.sides(*input.shape[2:]), self.groups
        return kernels.conv2d_relu(
            input, self.weight, self.bias, self.stride[0], sides, groups, self.relu
        )

    def extra_repr(self) -> str:
        stock = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{stock}, ceil_mode={self.ceil_mode}, relu={self.relu}"


class MaxPool2d(nn.Module):
    """Max-pooling over kernel_size x kernel_size windows, overlapping by default (P§3.4)."""

    def __init__(self, kernel_size: int = 3, stride: int = 2, ceil_mode: bool = False) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.ceil_mode = kernel_size, stride, ceil_mode

    def output_size(self, size: int) -> int:
        """Windows along an axis of ``size`` pixels; below 1 where none fits."""
        return kernels.pooled_size(size, self.kernel_size, self.stride, self.ceil_mode)

    def forward(self, input: Tensor) -> Tensor:
        return kernels.max_pool2d(input, self.kernel_size, self.stride, self.ceil_mode)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, ceil_mode={self.ceil_mode}"


class LRNMaxPool2d(MaxPool2d):
    """``kernels.lrn_max_pool2d``, and ReLU after it with ``relu``, as in the authors' net 145."""

    def __init__(
        self,
        size: int = 5,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 2.0,
        groups: int = 1,
        kernel_size: int = 3,
        stride: int = 2,
        ceil_mode: bool = False,
        relu: bool = False,
        signed: bool = True,
    ) -> None:
        super().__init__(kernel_size, stride, ceil_mode)
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k
        self.groups, self.relu, self.signed = groups, relu, signed

    def forward(self, input: Tensor) -> Tensor:
        norm = (self.size, self.alpha, self.beta, self.k)
        pool = (self.kernel_size, self.stride)
        # A program that is exported is to hold torch's own operators alone. What is_exporting()
        # reads: torch.compile of torch 2.11 answers True for itself.
        exporting = getattr(torch.compiler, "_is_exporting_flag", False)
        function = kernels.reference.lrn_max_pool2d if exporting else kernels.lrn_max_pool2d
        output = function(input, *norm, self.groups, *pool, self.ceil_mode, self.signed)
        return F.relu(output) if self.relu else output

    def extra_repr(self) -> str:
        return (
            f"size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}, "
            f"groups={self.groups}, relu={self.relu}, {super().extra_repr()}"
        )


@torch.fx.wrap
def spatial_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """x * (k + alpha * mean of x^2 over size x size pixels of its map, zeros outside) ^ -beta."""
    narrow = input.dtype == torch.float16 or input.dtype == torch.bfloat16
    wide = input.float() if narrow else input
    before, after = size // 2, (size - 1) // 2
    squares = F.pad(wide * wide, [before, after, before, after])
    mean = F.avg_pool2d(squares, size, 1)
    return (wide * (k + alpha * mean) ** -beta).to(input.dtype)


class SpatialResponseNorm(nn.Module):
    """Response normalisation within a map, over size x size pixels.

        y = x * (k + alpha / size^2 * (sum of x^2 over the window, zeros outside)) ^ -beta

    Source: S:layers/layers-145.cfg, cnorm2; S:layer.py:1183 for the division.
    """

    def __init__(
        self, size: int = 5, alpha: float = 1e-3, beta: float = 0.75, k: float = 1.0
    ) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, input: Tensor) -> Tensor:
        return spatial_response_norm(input, self.size, self.alpha, self.beta, self.k)

    def extra_repr(self) -> str:
        return f"size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


class DropoutMask(NamedTuple):
    """Which units are dropped; see ``kernels.linear_relu_dropout``."""

    rng: Tensor | None = None
    row_offset: int = 0
    feature_offset: int = 0


class CounterDropout:
    """What the layers that drop units share: ``mask``, which units those are."""

    mask: DropoutMask = DropoutMask()

    def set_mask(self, **changes: Any) -> None:
        """Change fields of ``mask``."""
        self.mask = self.mask._replace(**changes)


class Linear(nn.Linear):
    """Fully connected + bias."""

    def forward(self, input: Tensor) -> Tensor:
        return kernels.linear_relu_dropout(input, self.weight, self.bias, p=0.0, relu=False)


class LinearReLUDropout(CounterDropout, nn.Linear):
    """Fully connected + bias + ReLU, and dropout with probability ``p`` in training (P§4.2).

    ``groups`` blocks of inputs are each read by their own block of outputs; the weight then is
    [out_features, in_features / groups], as a grouped convolution's.
    """

    def __init__(
        self, in_features: int, out_features: int, p: float = 0.5, groups: int = 1
    ) -> None:
        super().__init__(in_features // groups, out_features)
        self.in_features, self.groups, self._p = in_features, groups, p
        self._absorbed: tuple[nn.Dropout, ...] = ()

    def absorb(self, dropout: nn.Dropout) -> None:
        """Drop while ``dropout``, which stands behind the ReLU, is in training, with its ``p``."""
        self._absorbed = (dropout,)  # in a tuple, so that it is no child

    @property
    def p(self) -> float:
        """Probability that a unit is dropped in training."""
        return self._absorbed[0].p if self._absorbed else self._p

    def train(self, mode: bool = True) -> LinearReLUDropout:
        """As any module, and what is absorbed likewise: the layer may be used alone."""
        for module in self._absorbed:
            module.train(mode)
        return super().train(mode)

    @property
    def dropping(self) -> bool:
        """Whether units are dropped now."""
        return all(module.training for module in self._absorbed or (self,))

    def forward(self, input: Tensor) -> Tensor:
        options, (rng, row, feature) = (self.p, True, self.dropping), self.mask
        if self.groups == 1:  # chunk's backward would copy the gradients, of one chunk too
            whole = (input, self.weight, self.bias)
            return kernels.linear_relu_dropout(*whole, *options, rng, row, feature)
        outputs: list[Tensor] = []
        for x, w, b in zip(
            input.chunk(self.groups, 1), self.weight.chunk(self.groups),
            self.bias.chunk(self.groups), strict=True,
        ):  # fmt: skip
            first = feature + len(outputs) * len(b)
            outputs.append(kernels.linear_relu_dropout(x, w, b, *options, rng, row, first))
        return torch.cat(outputs, dim=1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relu=True, p={self.p}, groups={self.groups}"


class Dropout(CounterDropout, nn.Dropout):
    """Dropout of [N, features] with probability ``p`` in training."""

    def forward(self, input: Tensor) -> Tensor:
        return kernels.dropout(input, self.p, self.training, *self.mask)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """Average pooling to a fixed size; nothing to do at the size the net was made for."""

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[2:] == self.output_size:
            return input
        # On a GPU torch adds up the gradients of small maps atomically, in any order.
        return average(input, self.output_size) if input.is_cuda else super().forward(input)


def average(input: Tensor, size: Any) -> Tensor:
    """Adaptive average pooling of [N, C, H, W] as two products, whose sums have one order."""
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    shares = []  # [parts, length]: each part averages the elements it overlaps, as torch cuts them
    for length, parts in zip(input.shape[2:], size, strict=True):
        part = torch.arange(parts, device=input.device).unsqueeze(1)
        first, last = part * length // parts, ((part + 1) * length - 1) // parts
        element = torch.arange(length, device=input.device)
        inside = (element >= first) & (element <= last)
        shares.append(inside.to(wide.dtype) / (last - first + 1))
    with torch.autocast(input.device.type, enabled=False):
        averaged: Tensor = shares[0] @ wide @ shares[1].t()
    return averaged.to(input.dtype)
