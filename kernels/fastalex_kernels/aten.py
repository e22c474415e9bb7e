"""The functions of this package on torch's own operators: oneDNN on a CPU, cuDNN on a GPU.

This is what runs without a GPU, and the baseline on one. Activations are kept channels last, which
oneDNN and cuDNN prefer and where the window of LRN is a run of neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fastalex_kernels.common import philox
from fastalex_kernels.common.backend import operator

_NO_LABEL = -(2**63)  # every other one that is no class is an error
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


def _power(d: torch.Tensor, beta: float, out: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """out = d ** beta; two square roots are far cheaper than a power."""
    if beta == 0.75:
        torch.sqrt(d, out=scratch)
        return torch.sqrt(scratch, out=out).mul_(scratch)
    return torch.pow(d, beta, out=out)


def rows_of_groups(x: torch.Tensor, groups: int) -> torch.Tensor:
    """A channels-last x [N, C, H, W] as [N * H * W * groups, C / groups], one group to a row."""
    channels = x.shape[1] // groups
    return x.permute(0, 2, 3, 1).reshape(x.numel() // max(channels, 1), channels)


def lrn_window(channels: int, size: int) -> tuple[int, int]:
    """Neighbours below and above in a window."""
    below, above = (min(n, max(channels - 1, 0)) for n in (size // 2, (size - 1) // 2))
    return below, above


def _first(buffer: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return buffer[: rows * columns].view(rows, columns)


def _blocks(
    buffers: int, margin: int, *tensors: torch.Tensor
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Go through tensors of one shape, on a CPU in blocks of rows that stay in its cache.

    Each block comes after rows of zeros that are ``margin`` longer and after ``buffers`` flat
    buffers of that size, the same memory every time: a fresh half megabyte costs more in page
    faults than what is computed in it.
    """
    rows, channels = tensors[0].shape
    if rows * channels == 0:
        return
    step = rows if tensors[0].is_cuda else max(1, min(rows, _BLOCK // channels))
    padded, *flat = tensors[0].new_zeros(1 + buffers, step * (channels + margin)).unbind()
    for block in zip(*(t.split(step) for t in tensors), strict=True):
        yield (_first(padded, block[0].shape[0], channels + margin), *flat, *block)


def _window_sum(
    padded: torch.Tensor, size: int, one: torch.Tensor, other: torch.Tensor
) -> torch.Tensor:
    """Sum padded[:, i .. i + size - 1] for each i that has so many columns before the row's end.

    The rows are added to themselves as one long line, shifted: sums of twice as many elements each
    time, and of one more where the binary digits of ``size`` say so. An element goes into the
    windows that hold it and into no other, also where it is not finite.
    """
    flat = total = padded.view(-1)
    end, length = flat.numel(), 1
    for digit in f"{size:b}"[1:]:
        for term, more in ((total, length), (flat, 1))[: 1 + int(digit)]:
            end -= more
            torch.add(total[:end], term[length : length + end], out=one[:end])
            total, one, other = one, other, one
            length += more
    return total[: flat.numel()].view(padded.shape)


@operator("lrn")
def _lrn(
    input: torch.Tensor, size: int, alpha: float, beta: float, k: float, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x / d^beta and d = k + alpha / size * (sum of x^2 over the window), channels last."""
    output = torch.empty_like(input)
    denominator = torch.empty_like(rows_of_groups(input, groups))
    channels = denominator.shape[1]
    below, above = lrn_window(channels, size)
    constant = input.new_full((channels,), k)
    wholes = (rows_of_groups(input, groups), denominator, rows_of_groups(output, groups))
    for padded, a, b, x, d, y in _blocks(2, below + above, *wholes):
        torch.mul(x, x, out=padded[:, below : below + channels])
        total = _window_sum(padded, below + 1 + above, a, b)[:, :channels]
        torch.add(constant, total, alpha=alpha / size, out=d)
        a, b = _first(a, *x.shape), _first(b, *x.shape)
        torch.div(x, _power(d, beta, out=b, scratch=a), out=y)
    return output, denominator


@_lrn.register_fake
def _(
    input: torch.Tensor, size: int, alpha: float, beta: float, k: float, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(input), torch.empty_like(rows_of_groups(input, groups))


@operator("lrn_backward")
def _lrn_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    denominator: torch.Tensor,
    size: int,
    alpha: float,
    beta: float,
    groups: int,
) -> torch.Tensor:
    grad = grad.contiguous(memory_format=torch.channels_last)
    result = torch.empty_like(input)
    channels = denominator.shape[1]
    below, above = lrn_window(channels, size)
    wholes = (denominator, *(rows_of_groups(t, groups) for t in (input, grad, result)))
    for padded, a, b, z, d, x, dy, dx in _blocks(3, below + above, *wholes):
        z, p, q = (_first(t, *x.shape) for t in (z, a, b))
        torch.div(dy, _power(d, beta, out=q, scratch=p), out=z)
        # The scale goes with 1 / d: apart, the largest alpha leaves float32's range.
        torch.mul(z, x, out=p).mul_(alpha / size)
        torch.div(p, d, out=padded[:, above : above + channels])
        neighbours = _window_sum(padded, below + 1 + above, a, b)[:, :channels]
        torch.addcmul(z, neighbours, x, value=-2.0 * beta, out=dx)
    return result


@_lrn_backward.register_fake
def _(
    grad: torch.Tensor,
    input: torch.Tensor,
    denominator: torch.Tensor,
    size: int,
    alpha: float,
    beta: float,
    groups: int,
) -> torch.Tensor:
    return torch.empty_like(input)


def _save_lrn(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    input, size, alpha, beta, _, groups = inputs
    ctx.save_for_backward(input, output[1])
    ctx.arguments = (size, alpha, beta, groups)


def _differentiate_lrn(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    dx = _lrn_backward(grad, *ctx.saved_tensors, *ctx.arguments)
    return dx, None, None, None, None, None


_lrn.register_autograd(_differentiate_lrn, setup_context=_save_lrn)


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
    wide = wide.contiguous(memory_format=torch.channels_last)
    normalised: torch.Tensor = _lrn(wide, size, alpha, beta, k, groups)[0]
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
    kept = philox.keep_mask(rng, rows, features, p, row_offset, feature_offset)
    # Not a product with the mask: what is dropped is zero even where it is not finite.
    return torch.where(kept, input / (1.0 - p), input.new_zeros(()))


def cross_entropy(input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    return F.cross_entropy(wide, target, ignore_index=_NO_LABEL)


def augment(
    images: torch.Tensor,
    tops: torch.Tensor,
    lefts: torch.Tensor,
    mirrors: torch.Tensor,
    colors: torch.Tensor | None,
    mean: torch.Tensor | None,
    scale: torch.Tensor | None,
    centred: bool,
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
    wide = torch.promote_types(dtype, torch.float32)
    x = x.to(wide).view(N, size, size * 3)
    if mean is not None and mean.dim() == 3:
        first, start = (H - size) // 2, (W - size) // 2
        centre = mean[first : first + size, start : start + size].reshape(1, size, size * 3)
        x -= centre if centred else mean[rows, columns].view_as(x)
        mean = None
    # Repeated along a line: an inner loop over three channels would take several times as long.
    factor = torch.ones(3, dtype=wide, device=x.device) if scale is None else scale.to(wide)
    shift = torch.zeros(1, 3, dtype=wide, device=x.device) if colors is None else colors.to(wide)
    shift = (shift if mean is None else shift - mean) * factor
    torch.addcmul(shift.repeat(1, size)[:, None], x, factor.repeat(size), out=x)
    x = x.view(N, size, size, 3)
    (top, _), (left, _) = padding
    x = F.pad(x.to(dtype), (0, 0, left, width - left - size, top, height - top - size))
    if block == 1:
        return x
    x = x.reshape(N, height // block, block, width // block, block, 3).permute(1, 3, 0, 2, 4, 5)
    return x.reshape(height // block, width // block, N, block * block * 3)
