"""The strided convolution of an image that comes with its stride removed already.

``augment`` writes the blocks that ``conv2d_relu`` would rearrange a strided input into; here they
go to its kernels as they lie, and only the weight is rearranged.
"""

from __future__ import annotations

import torch

from fastalex_kernels._conv2d_arguments import space_to_depth_weight
from fastalex_kernels._launch import (
    autocast,
    check_floating,
    interpretable,
    outside_graphs,
    use_triton,
)
from fastalex_kernels.conv2d_relu import Conv2dReLUFunction, conv2d_relu
from fastalex_kernels.momentum import Updates


def conv2d_relu_space_to_depth(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int = 4,
    relu: bool = True,
    update: Updates | None = None,
) -> torch.Tensor:
    """Convolution with a stride + bias + ReLU, of blocks of stride x stride pixels.

    Equal to ``conv2d_relu(image, weight, bias, stride)``, the zeros of a padding being part of the
    image, for the image whose pixel (stride * p + i, stride * q + j) of channel c is
    ``input[:, (i * stride + j) * C + c, p, q]``; ``augment`` writes it so. Differentiable in input,
    weight and bias.

    Args:
        input: [N, stride * stride * C, P, Q], of any strides; HWNC memory is read as it lies.
        weight: [K, C, R, S] as for the image, of the input's dtype and device.
        bias: [K] or None.
        stride: pixels between outputs, and the side of a block.
        relu: whether negative outputs become zero.
        update: of ``weight`` and ``bias``, as for ``conv2d_relu``.

    Returns:
        [N, K, P - ceil(R / stride) + 1, Q - ceil(S / stride) + 1].

    Raises:
        TypeError: for a wrong type or dtype.
        ValueError: for a wrong shape, device, or a value out of range.
    """
    if not isinstance(stride, int) or isinstance(stride, bool):
        raise TypeError(f"stride: expected an int, got {stride!r}")
    if stride < 1:
        raise ValueError(f"stride: expected at least 1, got {stride}")
    check_floating("input", input)
    check_floating("weight", weight)
    if weight.dim() != 4 or min(weight.shape) < 1:
        raise ValueError(
            f"weight: expected [out, in, height, width], got shape {tuple(weight.shape)}"
        )
    channels = stride * stride * weight.shape[1]
    if input.dim() != 4 or input.shape[1] != channels:
        raise ValueError(
            f"input: expected [N, {channels}, P, Q] for weight {tuple(weight.shape)} and stride "
            f"{stride}, got shape {tuple(input.shape)}"
        )
    for name, blocks, kernel in zip(
        ("height", "width"), input.shape[2:], weight.shape[2:], strict=True
    ):
        if blocks * stride < kernel:
            raise ValueError(
                f"input: {name} {blocks} x {stride} is below the kernel's {kernel} pixels"
            )
    if update is not None:
        if torch.compiler.is_compiling():
            layer = (input, weight, bias, stride, relu, update)
            return outside_graphs(conv2d_relu_space_to_depth, *layer)
        (input,) = autocast(input)
        update.check(input, weight, bias)
        if use_triton(input):
            return _updated(input, weight, bias, stride, relu, update)
        weight, bias = update.applied(input.dtype)
    return conv2d_relu(input, space_to_depth_weight(weight, (stride, stride)), bias, relu=relu)


def _updated(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    relu: bool,
    update: Updates,
) -> torch.Tensor:
    """The kernels of ``conv2d_relu``, which find the parameters in ``update``."""
    (given,) = interpretable(input)
    no_padding = ((0, 0), (0, 0))
    output: torch.Tensor = Conv2dReLUFunction.apply(
        given, weight, bias, no_padding, 1, relu, update, stride
    )
    return output.to(input.dtype)
