"""The functions as layers, for ``kernelize`` of Hugging Face's library ``kernels``.

Each is a ``forward`` alone: it takes the place of another layer's, and reads the attributes of that
layer by torch's names.
"""

from __future__ import annotations

import torch
from torch import nn

from .conv2d.function import conv2d_relu
from .lrn_pool.function import lrn_max_pool2d, max_pool2d


class Conv2dReLU(nn.Module):
    """ReLU of what an ``nn.Conv2d`` with zero padding and no dilation computes."""

    has_backward = True
    can_torch_compile = True

    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return conv2d_relu(input, self.weight, self.bias, self.stride[0], self.padding, self.groups)


class MaxPool2d(nn.Module):
    """What an ``nn.MaxPool2d`` with square windows and no padding computes."""

    has_backward = True
    can_torch_compile = True

    kernel_size: int
    stride: int
    ceil_mode: bool

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return max_pool2d(input, self.kernel_size, self.stride, self.ceil_mode)


class LRNMaxPool2d(MaxPool2d):
    """``MaxPool2d`` of what an ``nn.LocalResponseNorm`` computes; it has the attributes of both."""

    size: int
    alpha: float
    beta: float
    k: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        norm = (self.size, self.alpha, self.beta, self.k)
        pool = (self.kernel_size, self.stride, self.ceil_mode)
        return lrn_max_pool2d(input, *norm, 1, *pool)
