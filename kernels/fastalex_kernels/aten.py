"""The functions of this package on torch's own operators: oneDNN on a CPU, cuDNN on a GPU.

This is what runs without a GPU, and the baseline on one. Activations are kept channels last, which
oneDNN and cuDNN prefer and where the window of LRN is a run of neighbours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .common import philox
from .common.backend import operator
from .common.parameters import Dropout, Norm, Pooling, Window, norm_of
from .common.threads import share

_NO_LABEL = -(2**63)  # every other one that is no class is an error
_IN_CACHE = 2**19  # numbers of a CPU's last cache that a thread's images may fill


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


def _share_images(function: Callable[..., None], input: torch.Tensor, *more: torch.Tensor) -> None:
    """Call ``function`` with as many images at a time as a CPU's cache holds; a GPU takes all."""
    image = max(input[:1].numel(), 1)
    at_once = max(len(input) if input.is_cuda else _IN_CACHE // image, 1)
    share(function, *(batch.split(at_once) for batch in (input, *more)))


class _Lines:
    """The layout in which LRN sums windows, for images [n, C, H, W], channels last.

    The channels of one group of a pixel are a row. A line holds all rows, each followed by as many
    zeros as a window has further channels, so that no window reaches the next row's.
    """

    def __init__(self, x: torch.Tensor, norm: Norm, groups: int) -> None:
        self.channels = x.shape[1] // groups
        below, above = norm.size // 2, (norm.size - 1) // 2
        self.below, self.above = (min(reach, self.channels - 1) for reach in (below, above))
        self._width = self.channels + self.below + self.above
        self.length = x.numel() // self.channels * self._width

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).view(-1, self.channels)

    def columns(self, line: torch.Tensor, first: int = 0) -> torch.Tensor:
        """The rows of a line, where a row's values start at column ``first``."""
        return line[: self.length].view(-1, self._width)[:, first : first + self.channels]

    def windows(self, operation: Any, before: int, *operands: torch.Tensor) -> torch.Tensor:
        """A line of the sums of the operation's results over windows from ``before`` them on."""
        padded = operands[0].new_zeros(self.length + self.below + self.above)
        operation(*operands, out=self.columns(padded, before))
        return _sum_neighbours(padded, 1 + self.below + self.above)


def _sum_neighbours(line: torch.Tensor, count: int) -> torch.Tensor:
    """For each value of a line, the sum of ``count`` from it on, in memory of its own.

    A value goes into the sums that hold it and into no other, also where it is not finite.
    """
    if count == 1:
        return line.clone()
    half = count // 2
    sums = _sum_neighbours(line, half) if half > 1 else line
    sums = sums[:-half] + sums[half:]
    return sums[:-1].add_(line[count - 1 :]) if count % 2 else sums


def _powers(root: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """d ^ beta and d, from d ^ 1/4 where beta is 3/4, as roots are cheaper than a power; or d."""
    if beta != 0.75:
        return root**beta, root
    square = root * root
    return square * root, square.mul_(square)


def _forward(
    pooling: Pooling, ceil_mode: bool,
    input: torch.Tensor, output: torch.Tensor, argmax: torch.Tensor, roots: torch.Tensor,
) -> None:  # fmt: skip
    """Fill ``output``, ``argmax`` where anything is pooled, and ``roots`` where they are kept."""
    norm, groups, window = pooling
    assert norm is not None
    lines = _Lines(input, norm, groups)
    rows = lines.rows(input)
    d = lines.windows(torch.mul, lines.below, rows, rows).mul_(norm.scale).add_(norm.offset)
    root = d.rsqrt_().rsqrt_() if norm.beta == 0.75 else d
    if roots.numel():
        roots.view(-1).copy_(root)
    power = lines.columns(_powers(root, norm.beta)[0])
    pooled = window != (1, 1)
    normalised = torch.empty_like(input) if pooled else output
    torch.div(rows, power, out=lines.rows(normalised))
    if pooled:
        torch.ops.aten.max_pool2d_with_indices.out(
            normalised, window.size, window.stride, 0, 1, ceil_mode, out=output, indices=argmax
        )


def _backward(
    pooling: Pooling, ceil_mode: bool,
    input: torch.Tensor, grad: torch.Tensor, argmax: torch.Tensor, roots: torch.Tensor,
    result: torch.Tensor,
) -> None:  # fmt: skip
    """Fill ``result``."""
    norm, groups, window = pooling
    assert norm is not None
    lines = _Lines(input, norm, groups)
    if window != (1, 1):
        grad = torch.ops.aten.max_pool2d_with_indices_backward(
            grad, input, window.size, window.stride, 0, 1, ceil_mode, argmax
        ).contiguous(memory_format=torch.channels_last)  # of one image it may be plain
    rows, (power, d) = lines.rows(input), map(lines.columns, _powers(roots.view(-1), norm.beta))
    z = lines.rows(grad) / power
    # The scale goes with 1 / d: apart, the largest alpha leaves float32's range.
    sums = lines.windows(torch.div, lines.above, (z * rows).mul_(norm.scale), d)
    torch.addcmul(z, lines.columns(sums), rows, value=-2.0 * norm.beta, out=lines.rows(result))


def _pooling(norm: Sequence[float], groups: int, window: Sequence[int]) -> Pooling:
    return Pooling(norm_of(norm), groups, Window(*window))


def _outputs(
    input: torch.Tensor,
    norm: Sequence[float],
    groups: int,
    window: Sequence[int],
    ceil_mode: bool,
    pooled: Sequence[int],
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for the output; the places of its maxima, if anything is pooled; the roots, if kept.

    Channels last; allocated so and not a view: autograd refuses to change a view that an operator
    returned.
    """
    N, C = input.shape[:2]
    size = (N, C, *pooled)
    places = size if list(window) != [1, 1] else (N, 0, 0, 0)
    make = functools.partial(torch.empty, device=input.device, memory_format=torch.channels_last)
    length = _Lines(input[:1], norm_of(norm), groups).length if save else 0
    roots = input.new_empty((N, length))
    return make(size, dtype=input.dtype), make(places, dtype=torch.int64), roots


@operator("aten_lrn_max_pool2d")
def _lrn_max_pool2d(
    input: torch.Tensor,
    norm: Sequence[float],
    groups: int,
    window: Sequence[int],
    ceil_mode: bool,
    pooled: Sequence[int],
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs = _outputs(input, norm, groups, window, ceil_mode, pooled, save)
    forward = functools.partial(_forward, _pooling(norm, groups, window), ceil_mode)
    _share_images(forward, input, *outputs)
    return outputs


_lrn_max_pool2d.register_fake(_outputs)


@operator("aten_lrn_max_pool2d_backward")
def _lrn_max_pool2d_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    argmax: torch.Tensor,
    roots: torch.Tensor,
    norm: Sequence[float],
    groups: int,
    window: Sequence[int],
    ceil_mode: bool,
) -> torch.Tensor:
    grad = grad.contiguous(memory_format=torch.channels_last)
    result = torch.empty_like(input)
    backward = functools.partial(_backward, _pooling(norm, groups, window), ceil_mode)
    _share_images(backward, input, grad, argmax, roots, result)
    return result


_lrn_max_pool2d_backward.register_fake(lambda grad, input, *_: torch.empty_like(input))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    input, *arguments, _, _ = inputs
    ctx.save_for_backward(input, *output[1:])
    ctx.arguments = arguments


def _differentiate(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    dx = _lrn_max_pool2d_backward(grad, *ctx.saved_tensors, *ctx.arguments)
    return dx, None, None, None, None, None, None


_lrn_max_pool2d.register_autograd(_differentiate, setup_context=_save)


def lrn_max_pool2d(
    input: torch.Tensor,
    norm: Norm,
    groups: int,
    window: Window,
    ceil_mode: bool,
    pooled: tuple[int, int],
) -> torch.Tensor:
    # Rounding before the maximum would make equals of neighbours: stay wide until the end.
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    wide = wide.contiguous(memory_format=torch.channels_last)
    save = torch.is_grad_enabled() and input.requires_grad
    arguments = (list(map(float, norm)), groups, window, ceil_mode, pooled, save)
    output: torch.Tensor = _lrn_max_pool2d(wide, *arguments)[0]
    return output.to(input.dtype)


def max_pool2d(input: torch.Tensor, kernel_size: int, stride: int, ceil_mode: bool) -> torch.Tensor:
    if kernel_size == 1 and stride == 1:
        return input.clone()
    input = input.contiguous(memory_format=torch.channels_last)
    return F.max_pool2d(input, kernel_size, stride, ceil_mode=ceil_mode)


def linear_relu_dropout(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    relu: bool,
    given: Dropout,
) -> torch.Tensor:
    output = F.linear(input, weight, bias)
    if relu:
        output = output.relu_()
    return output if given.rng is None else dropout(output, given)


def dropout(input: torch.Tensor, given: Dropout) -> torch.Tensor:
    p, rng, row, feature = given
    assert rng is not None
    kept = philox.keep_mask(rng, len(input), input.shape[1], p, row, feature)
    # Not a product with the mask: what is dropped is zero even where it is not finite.
    return torch.where(kept, input / (1.0 - p), input.new_zeros(()))


def cross_entropy(input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    return F.cross_entropy(wide, target, ignore_index=_NO_LABEL)


def augment(
    images: torch.Tensor,
    crops: Sequence[torch.Tensor],
    colors: torch.Tensor | None,
    norm: tuple[torch.Tensor | None, torch.Tensor | None, bool],
    size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[N, size, size, 3]."""
    (N, H, W, _), (tops, lefts, mirrors), (mean, scale, centred) = images.shape, crops, norm
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
    return x.view(N, size, size, 3).to(dtype)
