"""The functions of this package on torch's own operators: oneDNN on a CPU, cuDNN on a GPU.

This is what runs without a GPU, and the baseline on one. Activations are kept channels last, which
oneDNN and cuDNN prefer and which makes the window sum of LRN a product with a banded matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fastalex_kernels import _philox

_BLOCK = 1 << 17  # elements of LRN handled at a time on a CPU: they stay in its cache


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
    weight = weight.contiguous()  # torch's slow convolution cannot differentiate other strides
    output = F.conv2d(input, weight, bias, stride, (top, left), groups=groups)
    return output.relu_() if relu else output


@functools.lru_cache(maxsize=64)
def _band(channels: int, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """B[j, i] = 1 where channel j lies in the window of channel i."""
    i = torch.arange(channels, device=device)
    distance = i[:, None] - i[None, :]
    return ((distance >= -(size // 2)) & (distance <= (size - 1) // 2)).to(dtype)


def _power(d: torch.Tensor, beta: float, out: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """out = d ** beta; two square roots are far cheaper than a power."""
    if beta == 0.75:
        torch.sqrt(d, out=scratch)
        return torch.sqrt(scratch, out=out).mul_(scratch)
    return torch.pow(d, beta, out=out)


def _rows(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, ...]:
    """The groups of x [N, C, H, W], each as [N * H * W, C / groups]; views of a channels-last x."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).chunk(groups, dim=1)


def _blocks(buffers: int, *tensors: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Go through tensors group by group, and on a CPU in blocks of rows that stay in its cache.

    Each block comes after ``buffers`` contiguous ones of its shape to compute in, the same memory
    every time: a fresh half megabyte costs more in page faults than what is computed in it.
    """
    first = tensors[0][0]
    rows, channels = first.shape
    step = max(1, rows if first.is_cuda else min(rows, _BLOCK // channels))
    memory = first.new_empty(buffers, step, channels)
    for group in zip(*tensors, strict=True):
        for block in zip(*(t.split(step) for t in group), strict=True):
            yield (*memory[:, : block[0].shape[0]].unbind(), *block)


class LRNFunction(torch.autograd.Function):
    """y = x / d^beta with d = k + alpha / size * (x^2 B), B the banded matrix of windows."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, size: int, alpha: float, beta: float, k: float, groups: int
    ) -> torch.Tensor:
        input = input.contiguous(memory_format=torch.channels_last)
        output = torch.empty_like(input)
        rows, channels = input.numel() // max(input.shape[1], 1), input.shape[1] // groups
        # Group by group, as roots of strided memory take several times as long.
        denominator = input.new_empty(groups, rows, channels)
        band = _band(channels, size, input.dtype, input.device)
        constant = input.new_full((channels,), k)
        groupwise = (_rows(input, groups), denominator.unbind(), _rows(output, groups))
        for a, b, x, d, y in _blocks(2, *groupwise):
            torch.addmm(constant, torch.mul(x, x, out=a), band, alpha=alpha / size, out=d)
            torch.div(x, _power(d, beta, out=b, scratch=a), out=y)
        ctx.save_for_backward(input, denominator)
        ctx.constants = (size, alpha, beta, groups)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, denominator = ctx.saved_tensors
        size, alpha, beta, groups = ctx.constants
        grad = grad.contiguous(memory_format=torch.channels_last)
        result = torch.empty_like(input)
        band = _band(input.shape[1] // groups, size, input.dtype, input.device).t()
        inputs, grads, results = (_rows(t, groups) for t in (input, grad, result))
        groupwise = (inputs, denominator.unbind(), grads, results)
        for a, b, z, x, d, dy, dx in _blocks(3, *groupwise):
            torch.div(dy, _power(d, beta, out=b, scratch=a), out=z)
            neighbours = torch.mm(torch.mul(z, x, out=a).div_(d), band, out=b)
            torch.addcmul(z, neighbours, x, value=-2.0 * alpha * beta / size, out=dx)
        return result, None, None, None, None, None


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
    normalised: torch.Tensor = LRNFunction.apply(wide, size, alpha, beta, k, groups)
    if (kernel_size, stride) != (1, 1):
        normalised = max_pool2d(normalised, kernel_size, stride, ceil_mode)
    return normalised.to(input.dtype)


def max_pool2d(input: torch.Tensor, kernel_size: int, stride: int, ceil_mode: bool) -> torch.Tensor:
    if kernel_size == 1 and stride == 1:
        return input.clone()
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
    rows, features = input.shape
    kept = _philox.keep_mask(rng, rows, features, p, row_offset, feature_offset)
    # Not a product with the mask: what is dropped is zero even where it is not finite.
    return torch.where(kept, input / (1.0 - p), input.new_zeros(()))


def augment(
    images: torch.Tensor,
    tops: torch.Tensor,
    lefts: torch.Tensor,
    mirrors: torch.Tensor,
    colors: torch.Tensor | None,
    mean: torch.Tensor | None,
    scale: torch.Tensor | None,
    size: int,
    padding: tuple[tuple[int, int], tuple[int, int]],
    block: int,
    lines: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    (N, H, W, _), (height, width) = images.shape, lines
    step = torch.arange(size, device=images.device)
    rows = (tops.clamp(0, H - size)[:, None] + step)[:, :, None]
    steps = torch.where(mirrors[:, None], size - 1 - step, step)
    columns = (lefts.clamp(0, W - size)[:, None] + steps)[:, None, :]
    x = images[torch.arange(N, device=images.device)[:, None, None], rows, columns]
    x = x.to(torch.promote_types(dtype, torch.float32))
    if colors is not None:
        x += colors[:, None, None]
    if mean is not None:
        x -= mean if mean.dim() == 1 else mean[rows, columns]
    if scale is not None:
        x *= scale
    (top, _), (left, _) = padding
    x = F.pad(x.to(dtype), (0, 0, left, width - left - size, top, height - top - size))
    if block == 1:
        return x
    x = x.reshape(N, height // block, block, width // block, block, 3).permute(1, 3, 0, 2, 4, 5)
    return x.reshape(height // block, width // block, N, block * block * 3)
