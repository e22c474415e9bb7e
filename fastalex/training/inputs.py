"""What a step is given, images or bytes and labels, and what its first layer reads of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastalex.data.augment import Augment
from fastalex.model.alexnet import AlexNet
from fastalex.model.layers import Conv2dReLU
from fastalex_kernels.augment import augment_forward, padded_lines
from fastalex_kernels.common.arguments import aligned
from fastalex_kernels.common.launch import call
from fastalex_kernels.conv2d.arguments import space_to_depth

BLOCK = 4  # pixels between the windows of a layer that reads blocks, and the side of a block
Inputs = Sequence[torch.Tensor | None]


def check_batch(images: Any, labels: torch.Tensor, model: AlexNet, augment: Augment | None) -> None:
    """Raise an error that names what is wrong with a batch."""
    if isinstance(images, (tuple, list)):
        if augment is None:
            raise ValueError("images: bytes need augment=, which says what becomes of them")
        augment(*(x[:0] for x in images))
        count, device = len(images[0]), images[0].device
    elif not isinstance(images, torch.Tensor):
        raise TypeError(f"images: expected a tensor or bytes, got {type(images).__name__}")
    elif images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        came = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images: expected floats [N, 3, H, W], got {came}")
    else:
        model.check_image_size(images.shape[2], images.shape[3])
        count, device = len(images), images.device
    expected = next(model.parameters()).device
    if device != expected:
        raise ValueError(f"images: expected device {expected}, got {device}")
    if labels.dtype != torch.int64 or labels.shape != (count,):
        came = f"{labels.dtype} {list(labels.shape)}"
        raise ValueError(f"labels: expected int64 [{count}], got {came}")
    if labels.device != device:
        raise ValueError(f"labels: expected device {device}, got {labels.device}")


def form_of(x: Any) -> object:
    """What of an input the recorded launches depend on."""
    if not isinstance(x, torch.Tensor):
        return type(x)
    return x.shape, x.stride(), x.dtype, x.device, aligned(x)


def tensors_of(images: Any, labels: torch.Tensor, has_kernels: bool) -> Inputs:
    """The tensors that the launches read: the images, or five of bytes; and the labels."""
    labels = labels.contiguous()
    if isinstance(images, torch.Tensor):
        return [images, labels]
    pixels, tops, lefts, mirrors, *colors = images
    if has_kernels:
        mirrors = mirrors.contiguous().view(torch.uint8)
        pixels, tops, lefts = pixels.contiguous(), tops.contiguous(), lefts.contiguous()
    return [pixels, tops, lefts, mirrors, colors[0] if colors else None, labels]


def image_size(images: Inputs, augment: Augment | None) -> tuple[int, int]:
    """Height and width of the images that the net gets."""
    if augment is not None and len(images) > 1:
        return augment.size, augment.size
    assert images[0] is not None
    return images[0].shape[2], images[0].shape[3]


def first_input(
    images: Inputs, augment: Augment | None, strided: Conv2dReLU | None, dtype: torch.dtype
) -> torch.Tensor:
    """What the first layer reads: HWNC maps, or blocks of pixels as their channels.

    Args:
        images: of ``tensors_of``, without the labels.
        augment: of bytes; None where there are images.
        strided: the first layer, where its kernels read blocks.
        dtype: of the maps.
    """
    if augment is None:
        return _made(images[0], strided, dtype)
    blocks = strided if strided is not None and strided.stride[0] == BLOCK else None
    size, block, kernel_size, sides = augment.size, 1, 1, ((0, 0), (0, 0))
    if blocks is not None:
        block, kernel_size, sides = BLOCK, blocks.kernel_size[0], blocks.sides(size, size)
    lines = padded_lines(size, sides, block, kernel_size)
    pixels, tops, lefts, mirrors, colors = images
    assert pixels is not None
    assert tops is not None
    assert lefts is not None
    assert mirrors is not None
    out = augment_forward(
        pixels, tops, lefts, mirrors, colors, augment.mean, augment.scale, augment.centred,
        size, sides, block, lines, dtype,
    )  # fmt: skip
    return out if blocks is not None else _made(out.permute(0, 3, 1, 2), strided, dtype)


def augmented(images: Inputs, augment: Augment, dtype: torch.dtype) -> torch.Tensor:
    """The images of bytes as HWNC maps, by torch's operators."""
    return _recorded(augmented_as_maps, dtype, augment, *images)


def _made(
    images: torch.Tensor | None, strided: Conv2dReLU | None, dtype: torch.dtype
) -> torch.Tensor:
    if strided is None:
        return _recorded(images_as_maps, dtype, images)
    return _recorded(images_as_blocks, dtype, images, strided)


def _recorded(
    make: Callable[..., torch.Tensor], dtype: torch.dtype, *arguments: Any
) -> torch.Tensor:
    """What ``make`` returns, in memory that later steps write again."""
    out = make(None, dtype, *arguments)
    call(make, out, dtype, *arguments)
    return out


def images_as_maps(
    out: torch.Tensor | None, dtype: torch.dtype, images: torch.Tensor
) -> torch.Tensor:
    """Images [N, 3, H, W] as HWNC in ``dtype``, in the memory ``out`` if it is given."""
    maps = images.permute(2, 3, 0, 1)
    out = maps.new_empty(maps.shape, dtype=dtype) if out is None else out
    return out.copy_(maps)


def images_as_blocks(
    out: torch.Tensor | None, dtype: torch.dtype, images: torch.Tensor, layer: Conv2dReLU
) -> torch.Tensor:
    """Images [N, 3, H, W] as the blocks that ``layer`` reads at stride 1; as ``images_as_maps``."""
    R, S = layer.kernel_size
    stride = (layer.stride[0], layer.stride[0])
    blocks = space_to_depth(images, (R, S), stride, layer.sides(*images.shape[2:]), 1)
    return images_as_maps(out, dtype, blocks)


def augmented_as_maps(
    out: torch.Tensor | None, dtype: torch.dtype, augment: Augment, *pixels: Any
) -> torch.Tensor:
    """What ``augment`` makes of bytes; as ``images_as_maps``."""
    return images_as_maps(out, dtype, augment(*(x for x in pixels if x is not None)))
