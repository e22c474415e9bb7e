"""Each function of this package in stock torch, at any dtype: the oracle of the tests.

Written to be read against the formulas, apart from the ATen path: no layout, no fusion, no banded
matrix. In float64 it is what every kernel is measured against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastalex_kernels._philox import keep_mask


def conv2d_relu(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | tuple[tuple[int, int], tuple[int, int]] = 0,
    groups: int = 1,
    relu: bool = True,
) -> torch.Tensor:
    """relu(conv2d(zero-padded input))."""
    vertical, horizontal = (padding, padding) if isinstance(padding, int) else padding
    top, bottom = (vertical, vertical) if isinstance(vertical, int) else vertical
    left, right = (horizontal, horizontal) if isinstance(horizontal, int) else horizontal
    padded = F.pad(input, (left, right, top, bottom))
    output = F.conv2d(padded, weight, bias, stride=stride, groups=groups)
    return F.relu(output) if relu else output


def local_response_norm(
    input: torch.Tensor, size: int, alpha: float, beta: float, k: float, groups: int = 1
) -> torch.Tensor:
    """torch's LocalResponseNorm, one group of channels at a time."""
    parts = input.chunk(groups, dim=1)
    return torch.cat([F.local_response_norm(x, size, alpha, beta, k) for x in parts], dim=1)


def lrn_max_pool2d(
    input: torch.Tensor,
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 2.0,
    groups: int = 1,
    kernel_size: int = 3,
    stride: int = 2,
    ceil_mode: bool = False,
    signed: bool = True,
) -> torch.Tensor:
    """max_pool2d(local_response_norm(input))."""
    normalised = local_response_norm(input, size, alpha, beta, k, groups)
    return max_pool2d(normalised, kernel_size, stride, ceil_mode)


def max_pool2d(
    input: torch.Tensor, kernel_size: int = 3, stride: int = 2, ceil_mode: bool = False
) -> torch.Tensor:
    """torch's max_pool2d."""
    return F.max_pool2d(input, kernel_size, stride, ceil_mode=ceil_mode)


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
    """dropout(relu(linear(input))), with the counter-based mask of ``rng``."""
    output = F.linear(input, weight, bias)
    if relu:
        output = F.relu(output)
    if not training or p == 0:
        return output
    if rng is None:
        raise ValueError("rng: the reference draws no seed of its own, pass (seed, offset)")
    rows, features = output.shape
    kept = keep_mask(rng, rows, features, p, row_offset, feature_offset)
    return torch.where(kept, output / (1.0 - p), torch.zeros_like(output))
