"""Each function of this package in stock torch, at any dtype: the oracle of the tests.

Written to be read against the formulas, apart from the ATen path: no layout, no fusion, no banded
matrix. In float64 it is what every kernel is measured against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .common.philox import keep_mask

# ||out - ref|| / ||ref||. float32: rounding grows as the square root of a sum's length. The others
# round the result once to their 8 or 11 bits of significand, and so were the inputs of a gradient
# that passes through two products. TF32 keeps 11 bits of each operand.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
TF32_TOLERANCE = 1e-3


def tolerance(dtype: torch.dtype, length: int, precision: str = "ieee") -> float:
    """The relative error allowed to a result of ``dtype`` whose elements sum ``length`` products.

    Args:
        precision: of the products, as ``fastalex_kernels.common.tuned.dot_precision`` says.
    """
    if dtype != torch.float32:
        return TOLERANCES[dtype]
    if length and precision == "tf32":
        return TF32_TOLERANCE
    return float(TOLERANCES[dtype] * max(1.0, (length / 1000) ** 0.5))


def relative_error(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref||, or ||out|| where the reference is all zeros."""
    out, ref = out.detach().double(), ref.detach().double()
    norm = float(ref.norm())
    return float((out - ref).norm()) / (norm or 1.0)


def _sides(padding: Any) -> list[tuple[int, int]]:
    vertical, horizontal = (padding, padding) if isinstance(padding, int) else padding
    return [(p, p) if isinstance(p, int) else p for p in (vertical, horizontal)]


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | tuple[tuple[int, int], tuple[int, int]] = 0,
    groups: int = 1,
    relu: bool = True,
) -> Tensor:
    """relu(conv2d(zero-padded input))."""
    (top, bottom), (left, right) = _sides(padding)
    padded = F.pad(input, (left, right, top, bottom))
    output = F.conv2d(padded, weight, bias, stride=stride, groups=groups)
    return F.relu(output) if relu else output


def local_response_norm(
    input: Tensor, size: int, alpha: float, beta: float, k: float, groups: int = 1
) -> Tensor:
    """torch's LocalResponseNorm, one group of channels at a time."""
    parts = input.chunk(groups, dim=1)
    return torch.cat([F.local_response_norm(x, size, alpha, beta, k) for x in parts], dim=1)


def lrn_max_pool2d(
    input: Tensor,
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 2.0,
    groups: int = 1,
    kernel_size: int = 3,
    stride: int = 2,
    ceil_mode: bool = False,
    signed: bool = True,
) -> Tensor:
    """max_pool2d(local_response_norm(input))."""
    normalised = local_response_norm(input, size, alpha, beta, k, groups)
    return max_pool2d(normalised, kernel_size, stride, ceil_mode)


def max_pool2d(
    input: Tensor, kernel_size: int = 3, stride: int = 2, ceil_mode: bool = False
) -> Tensor:
    """torch's max_pool2d."""
    return F.max_pool2d(input, kernel_size, stride, ceil_mode=ceil_mode)


def linear_relu_dropout(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = 0.5,
    relu: bool = True,
    training: bool = True,
    rng: Tensor | None = None,
    row_offset: int = 0,
    feature_offset: int = 0,
) -> Tensor:
    """dropout(relu(linear(input))), with the counter-based mask of ``rng``."""
    output = F.linear(input, weight, bias)
    output = F.relu(output) if relu else output
    if not training or p == 0:
        return output
    if rng is None:
        raise ValueError("rng: the reference draws no seed of its own, pass (seed, offset)")
    kept = keep_mask(rng, *output.shape, p, row_offset, feature_offset)  # type: ignore[call-arg,arg-type]
    return torch.where(kept, output / (1.0 - p), torch.zeros_like(output))


def cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    """Of each row, the logarithm of the softmax's denominator less the label's logit."""
    chosen = input.gather(1, target[:, None])[:, 0]
    return (input.logsumexp(1) - chosen).mean()


def _part(image: Tensor, top: int, left: int, size: int) -> Tensor:
    return image[top : top + size, left : left + size]


def augment(
    images: Tensor,
    crops: Sequence[Tensor],
    colors: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None, bool],
    size: int,
) -> Tensor:
    """Each image by itself: add, subtract, scale, then crop and flip; in float64.

    The centre of a mean image is subtracted from the flipped crop.
    """
    (tops, lefts, mirrors), (mean, scale, centred) = crops, norm
    output = torch.zeros(len(images), 3, size, size, dtype=torch.float64, device=images.device)
    for n, image in enumerate(images.double()):
        if colors is not None:
            image = image + colors[n]
        if mean is not None and not centred:
            image = image - mean
        first = min(max(int(tops[n]), 0), image.shape[0] - size)
        start = min(max(int(lefts[n]), 0), image.shape[1] - size)
        crop = _part(image, first, start, size)
        crop = crop.flip(1) if mirrors[n] else crop
        if mean is not None and centred:
            middle, centre = ((side - size) // 2 for side in image.shape[:2])
            crop = crop - (mean if mean.dim() == 1 else _part(mean, middle, centre, size))
        output[n] = (crop if scale is None else crop * scale).permute(2, 0, 1)
    return output
