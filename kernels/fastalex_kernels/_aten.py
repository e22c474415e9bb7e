"""The functions of this package on torch's own operators: oneDNN on a CPU, cuDNN on a GPU.

This is what runs without a GPU, and the baseline on one. Activations are kept channels last, which
oneDNN and cuDNN prefer and which makes the window sum of LRN a product with a banded matrix.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fastalex_kernels import _philox

_CHUNK = 1 << 18  # elements of LRN handled at a time on a CPU: they stay in the second-level cache


def conv2d_relu(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    groups: int,
    relu: bool,
) -> torch.Tensor:
    (top, bottom), (left, right) = padding
    if (top, left) != (bottom, right):
        input = F.pad(input, (left, right, top, bottom))
        top = left = 0
    input = input.contiguous(memory_format=torch.channels_last)
    output = F.conv2d(input, weight, bias, stride, (top, left), groups=groups)
    return output.relu_() if relu else output


@functools.lru_cache(maxsize=64)
def _band(
    channels: int, size: int, groups: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """B[j, i] = 1 where channel j lies in the window of channel i and in its group."""
    i = torch.arange(channels, device=device)
    distance = i[:, None] - i[None, :]
    group = i // (channels // groups)
    inside = (distance >= -(size // 2)) & (distance <= (size - 1) // 2)
    return (inside & (group[:, None] == group[None, :])).to(dtype)


def _power(d: torch.Tensor, beta: float) -> torch.Tensor:
    """d ** -beta; a square root and its reciprocal are far cheaper than a power."""
    if beta == 0.75:
        r = d.rsqrt()
        return r.mul_(r.sqrt())
    return d.pow(-beta)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [N, C, H, W] as [N * H * W, C], a view where x is channels last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class LRNFunction(torch.autograd.Function):
    """y = x * d^-beta with d = k + alpha / size * (x^2 B), B the banded matrix of windows."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, size: int, alpha: float, beta: float, k: float, groups: int
    ) -> torch.Tensor:
        input = input.contiguous(memory_format=torch.channels_last)
        output = torch.empty_like(input)
        x, y = _rows(input), _rows(output)
        denominator = torch.empty_like(x)
        band = _band(x.shape[1], size, groups, x.dtype, x.device)
        constant = x.new_full((x.shape[1],), k)
        for i in _chunks(x):
            torch.addmm(constant, x[i].square(), band, alpha=alpha / size, out=denominator[i])
            torch.mul(x[i], _power(denominator[i], beta), out=y[i])
        ctx.save_for_backward(input, denominator)
        ctx.constants = (size, alpha, beta, groups)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, denominator = ctx.saved_tensors
        size, alpha, beta, groups = ctx.constants
        result = torch.empty_like(input)
        x, dx = _rows(input), _rows(result)
        dy = _rows(grad.contiguous(memory_format=torch.channels_last))
        band = _band(x.shape[1], size, groups, x.dtype, x.device).t()
        for i in _chunks(x):
            z = _power(denominator[i], beta).mul_(dy[i])
            neighbours = (z * x[i]).div_(denominator[i]) @ band
            torch.addcmul(z, neighbours, x[i], value=-2.0 * alpha * beta / size, out=dx[i])
        return result, None, None, None, None, None


def _chunks(x: torch.Tensor) -> list[slice]:
    rows = len(x) if x.is_cuda else max(1, _CHUNK // x.shape[1])
    return [slice(i, i + rows) for i in range(0, len(x), rows)]


def lrn_max_pool2d(
    input: torch.Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size: int,
    stride: int,
    ceil_mode: bool,
) -> torch.Tensor:
    # Rounding before the maximum would make equals of neighbours: stay wide until the end.
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    normalised = LRNFunction.apply(wide, size, alpha, beta, k, groups)
    return max_pool2d(normalised, kernel_size, stride, ceil_mode).to(input.dtype)


def max_pool2d(input: torch.Tensor, kernel_size: int, stride: int, ceil_mode: bool) -> torch.Tensor:
    if kernel_size == 1 and stride == 1:
        return input
    input = input.contiguous(memory_format=torch.channels_last)
    return F.max_pool2d(input, kernel_size, stride, ceil_mode=ceil_mode)


def linear_relu_dropout(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    p: float,
    relu: bool,
    rng: torch.Tensor | None,
    row_offset: int,
    feature_offset: int,
) -> torch.Tensor:
    output = F.linear(input, weight, bias)
    if relu:
        output = output.relu_()
    return output if rng is None else dropout(output, p, rng, row_offset, feature_offset)


def dropout(
    input: torch.Tensor, p: float, rng: torch.Tensor, row_offset: int, feature_offset: int
) -> torch.Tensor:
    kept = _philox.keep_mask(rng, *input.shape, p, row_offset, feature_offset)
    return input * (kept.to(input.dtype) / (1.0 - p))
