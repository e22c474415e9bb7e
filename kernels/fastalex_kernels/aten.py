"""The functions of this package on torch's own operators: oneDNN on a CPU, cuDNN on a GPU.

This is what runs without a GPU, and the baseline on one. Activations are kept channels last, which
oneDNN and cuDNN prefer and where the window of LRN is a run of neighbours.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F

from fastalex_kernels.common import philox
from fastalex_kernels.common.backend import operator
from fastalex_kernels.common.parameters import Dropout, Norm, Window, norm_of

_NO_LABEL = -(2**63)  # every other one that is no class is an error


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


def _start_worker(ready: threading.Barrier) -> None:
    torch.set_num_threads(1)
    ready.wait()


@functools.cache
def _workers(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of ``process`` in which torch's operators start no threads of their own."""
    ready = threading.Barrier(threads + 1)
    workers = ThreadPoolExecutor(threads, "fastalex", _start_worker, (ready,))
    for _ in range(threads):
        workers.submit(int)
    ready.wait()
    torch.set_num_threads(threads)  # a worker's number had become that of threads yet to start
    return workers


def _share_images(function: Callable[..., None], *batches: torch.Tensor) -> None:
    """Call ``function`` with a share of the images in each of as many threads as torch uses.

    So a pass is one parallel region. With one for each operator, every operator would wait for the
    slowest thread: where another process has one of the cores, that takes a hundred times as long.
    """
    threads = torch.get_num_threads()
    shares = min(threads, len(batches[0]))
    if shares == 1 or batches[0].is_cuda:
        function(*batches)
    if shares < 2 or batches[0].is_cuda:
        return
    split = (batch.tensor_split(shares) for batch in batches)
    list(_workers(threads, os.getpid()).map(torch.inference_mode()(function), *split))


class _Lines:
    """Memory for the steps of LRN on images [n, C, H, W], channels last.

    The channels of one group of a pixel are a row. A line holds all rows, each followed by as many
    zeros as a window has further channels, so that no window reaches the next row's.
    """

    def __init__(self, x: torch.Tensor, norm: Norm, groups: int, count: int) -> None:
        self.channels = x.shape[1] // groups
        below, above = norm.size // 2, (norm.size - 1) // 2
        self.below, self.above = (min(reach, self.channels - 1) for reach in (below, above))
        self._width = self.channels + self.below + self.above
        self._length = x.numel() // self.channels * self._width
        self._lines = x.new_zeros((count, self._length + self.below + self.above))

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).view(-1, self.channels)

    def line(self, i: int) -> torch.Tensor:
        return self._lines[i, : self._length]

    def columns(self, i: int, first: int = 0) -> torch.Tensor:
        """The rows of line i, where a row's values start at column ``first``."""
        return self.line(i).view(-1, self._width)[:, first : first + self.channels]

    def sum_windows(self, i: int, out: int) -> torch.Tensor:
        """Line ``out``: for each value of line i, the sum of the window that starts with it.

        A value goes into the windows that hold it and into no other, also where it is not finite.
        """
        total = torch.mul(self.line(i), 1, out=self.line(out))
        for shift in range(1, 1 + self.below + self.above):
            total += self._lines[i, shift : shift + self._length]
        return total

    def denominator(self, rows: torch.Tensor, norm: Norm, squares: int, out: int) -> torch.Tensor:
        torch.mul(rows, rows, out=self.columns(squares, self.below))
        return self.sum_windows(squares, out).mul_(norm.scale).add_(norm.offset)

    def power(self, d: torch.Tensor, beta: float, out: int, scratch: int) -> torch.Tensor:
        """The rows of d ^ beta; two square roots are far cheaper than a power."""
        if beta == 0.75:
            root = torch.sqrt(d, out=self.line(scratch))
            torch.sqrt(root, out=self.line(out)).mul_(root)
        else:
            torch.pow(d, beta, out=self.line(out))
        return self.columns(out)


def _images(*batches: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Batches image by image on a CPU, in whose cache an image stays; all at once on a GPU."""
    at_once = max(len(batches[0]), 1) if batches[0].is_cuda else 1
    return list(zip(*(batch.split(at_once) for batch in batches), strict=True))


def _forward(
    norm: Norm, groups: int, window: Window, ceil_mode: bool,
    input: torch.Tensor, output: torch.Tensor, argmax: torch.Tensor,
) -> None:  # fmt: skip
    """Fill ``output`` and, where anything is pooled, ``argmax``."""
    images = _images(input, output, argmax)
    lines, normalised = _Lines(images[0][0], norm, groups, 3), torch.empty_like(images[0][0])
    pooled = window != (1, 1)
    for x, y, at in images:
        rows = lines.rows(x)
        power = lines.power(lines.denominator(rows, norm, 0, 1), norm.beta, 1, 2)
        torch.div(rows, power, out=lines.rows(normalised if pooled else y))
        if pooled:
            torch.ops.aten.max_pool2d_with_indices.out(
                normalised, window.size, window.stride, 0, 1, ceil_mode, out=y, indices=at
            )


def _backward(
    norm: Norm, groups: int, window: Window, ceil_mode: bool,
    grad: torch.Tensor, input: torch.Tensor, argmax: torch.Tensor, result: torch.Tensor,
) -> None:  # fmt: skip
    """Fill ``result``. The denominators are computed again, which costs less than reading them."""
    images = _images(grad, input, argmax, result)
    first = images[0][1]
    lines, (dy, z, t) = _Lines(first, norm, groups, 5), (torch.empty_like(first) for _ in range(3))
    for g, x, at, dx in images:
        if window == (1, 1):
            dy = g
        else:
            torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
                g, x, window.size, window.stride, 0, 1, ceil_mode, at, grad_input=dy
            )
        rows, z_rows, t_rows = (lines.rows(a) for a in (x, z, t))
        d = lines.denominator(rows, norm, 0, 1)
        torch.div(lines.rows(dy), lines.power(d, norm.beta, 2, 3), out=z_rows)
        # The scale goes with 1 / d: apart, the largest alpha leaves float32's range.
        torch.mul(z_rows, rows, out=t_rows).mul_(norm.scale)
        torch.div(t_rows, lines.columns(1), out=lines.columns(4, lines.above))
        lines.sum_windows(4, 2)
        torch.addcmul(z_rows, lines.columns(2), rows, value=-2.0 * norm.beta, out=lines.rows(dx))


def _outputs(
    input: torch.Tensor, window: Sequence[int], pooled: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for the output and the places of its maxima, if anything is pooled; channels last.

    Allocated so and not a view: autograd refuses to change a view that an operator returned.
    """
    N, C = input.shape[:2]
    size = (N, C, *pooled)
    places = size if list(window) != [1, 1] else (N, 0, 0, 0)
    make = functools.partial(torch.empty, device=input.device, memory_format=torch.channels_last)
    return make(size, dtype=input.dtype), make(places, dtype=torch.int64)


@operator("aten_lrn_max_pool2d")
def _lrn_max_pool2d(
    input: torch.Tensor,
    norm: Sequence[float],
    groups: int,
    window: Sequence[int],
    ceil_mode: bool,
    pooled: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    output, argmax = _outputs(input, window, pooled)
    arguments = (norm_of(norm), groups, Window(*window), ceil_mode)
    _share_images(functools.partial(_forward, *arguments), input, output, argmax)
    return output, argmax


@_lrn_max_pool2d.register_fake
def _(input, norm, groups, window, ceil_mode, pooled):
    return _outputs(input, window, pooled)


@operator("aten_lrn_max_pool2d_backward")
def _lrn_max_pool2d_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    argmax: torch.Tensor,
    norm: Sequence[float],
    groups: int,
    window: Sequence[int],
    ceil_mode: bool,
) -> torch.Tensor:
    grad = grad.contiguous(memory_format=torch.channels_last)
    result = torch.empty_like(input)
    arguments = (norm_of(norm), groups, Window(*window), ceil_mode)
    _share_images(functools.partial(_backward, *arguments), grad, input, argmax, result)
    return result


@_lrn_max_pool2d_backward.register_fake
def _(grad, input, *_):
    return torch.empty_like(input)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    input, *arguments, _ = inputs
    ctx.save_for_backward(input, output[1])
    ctx.arguments = arguments


def _differentiate(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    dx = _lrn_max_pool2d_backward(grad, *ctx.saved_tensors, *ctx.arguments)
    return dx, None, None, None, None, None


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
    arguments = (list(map(float, norm)), groups, window, ceil_mode, pooled)
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
