"""What a pass of the step should come to, in float64: the oracle of its first-use check."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fastalex.model.layers import LinearReLUDropout, LRNMaxPool2d
from fastalex.training.passes import Convolution, Pass, Pool
from fastalex_kernels import reference
from fastalex_kernels.common.layout import as_nchw
from fastalex_kernels.common.philox import keep_mask
from fastalex_kernels.conv2d.arguments import depth_to_space_weight

Tensor = torch.Tensor

_IMAGES = 32  # that are computed at once
_NEAR_TIE = 1e-4  # of the larger of two values: where they are closer, either is the maximum


def both_halves(one: Pass, x: Tensor) -> Tensor:
    """What a layer reads of both towers, where the other one's half is this one's again."""
    return x if getattr(one, "_gather", None) is None else torch.cat([x, x], -1)


def own_half(one: Pass, dx: Tensor) -> Tensor:
    """The gradient that is left of ``dx`` when the other tower got its half."""
    gather = getattr(one, "_gather", None)
    if gather is None:
        return dx
    mine, theirs = dx.chunk(2, -1)
    return mine + theirs if gather._summed else mine


def _linear_part(one: Pass, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    """A layer before its ReLU and dropout; maps are NCHW here, and x [N, features] else."""
    module: Any = one.module  # type: ignore[attr-defined]
    if isinstance(one, Pool):
        window = (module.kernel_size, module.stride, module.ceil_mode)
        if not isinstance(module, LRNMaxPool2d):
            return reference.max_pool2d(x, *window)
        groups = module.groups or 1
        norm = (module.size, module.alpha, module.beta, module.k)
        return reference.lrn_max_pool2d(x, *norm, groups, *window)
    assert w is not None
    if isinstance(one, Convolution):
        padding = int(module.padding[0]) if module.stride[0] == 1 else 0
        return F.conv2d(x, w.permute(3, 2, 0, 1), b, padding=padding, groups=module.groups)
    return F.linear(x, w, b)


def _chunks(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some images at a time as NCHW float64; rows all at once."""
    if x.dim() == 2:
        yield x.double(), *(other.double() for other in others)
        return
    for parts in zip(*(torch.split(tensor, _IMAGES, 2) for tensor in (x, *others)), strict=True):
        yield tuple(as_nchw(part).double() for part in parts)


def _wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.detach().double() for x in tensors]


def expected_output(one: Pass, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    w, b = _wide(w, b)
    parts = [_linear_part(one, part, w, b) for (part,) in _chunks(x)]
    y = torch.cat(parts)
    y = y.permute(2, 3, 0, 1) if x.dim() == 4 else y
    y = y.relu() if one.relu else y
    module: Any = one.module  # type: ignore[attr-defined]
    if isinstance(module, LinearReLUDropout) and module.p and module.training:
        rng, row, feature = module.mask
        assert rng is not None
        kept = keep_mask(rng, y.shape[0], y.shape[1], module.p, row, feature)
        y = torch.where(kept, y / (1.0 - module.p), 0.0)
    return y


def expected_gradients(
    one: Pass, x: Tensor, w: Tensor | None, b: Tensor | None, dz: Tensor
) -> tuple[Tensor | None, ...]:
    leaves = [None if t is None else t.requires_grad_() for t in _wide(w, b)]
    parameters = [t for t in leaves if t is not None]
    parts: list[Tensor] = []
    sums = [torch.zeros_like(t) for t in parameters]
    for part, dy in _chunks(x, dz):
        inputs = [part.requires_grad_(), *parameters] if one.needs_dx else parameters
        with torch.enable_grad():
            output = _linear_part(one, part, *leaves)
        gradients = list(torch.autograd.grad(output, inputs, dy))
        if one.needs_dx:
            parts.append(gradients.pop(0))
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient
    dx = None
    if parts:
        dx = torch.cat(parts)
        dx = dx.permute(2, 3, 0, 1) if x.dim() == 4 else dx
    rest = iter(sums)
    return dx, *(None if t is None else next(rest) for t in leaves)


def as_parameter(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient of a packed weight [R, S, C, K] in the parameter's own layout."""
    if parameter.dim() != 4:
        return gradient
    if gradient.shape[:2] == parameter.shape[2:]:
        return gradient.permute(3, 2, 0, 1)
    stride = math.isqrt(gradient.shape[2] // parameter.shape[1])
    return depth_to_space_weight(gradient, parameter.shape, (stride, stride))


def one_maximum(one: Pool, x: Tensor) -> Tensor:
    """1 where the gradient of a window has one place to go, else 0: [P, Q, N, C].

    That is where no second value is near the largest, or a ReLU below takes the gradient anyway.
    """
    module = one.module
    masks = []
    for (part,) in _chunks(x):
        if isinstance(module, LRNMaxPool2d):
            norm = (module.size, module.alpha, module.beta, module.k)
            part = reference.local_response_norm(part, *norm, module.groups or 1)
        height, width = map(module.output_size, part.shape[2:])
        window = (module.kernel_size, module.stride, (height, width))
        masked = one.masks_dx and F.max_pool2d(part, *window[:2], ceil_mode=module.ceil_mode) <= 0
        masks.append(single_maxima(part, *window) | masked)
    return torch.cat(masks).permute(2, 3, 0, 1).to(x.dtype)


def single_maxima(x: Tensor, size: int, stride: int, pooled: tuple[int, int]) -> Tensor:
    """Which of the ``pooled`` windows of x [N, C, H, W] have no second value near the largest."""
    sides = zip(pooled, x.shape[2:], strict=True)
    below, right = (max(0, (n - 1) * stride + size - side) for n, side in sides)
    x = F.pad(x, (0, right, 0, below), value=float("-inf"))
    windows = x.unfold(2, size, stride).unfold(3, size, stride).flatten(-2)
    largest = windows.amax(-1, keepdim=True)
    near = windows >= largest - _NEAR_TIE * largest.abs()
    return near.sum(-1) == 1
