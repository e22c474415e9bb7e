"""The tensors that a step reads, images or bytes and labels, and the input of its first layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import fastalex_kernels as kernels
from fastalex.data.augment import Augment
from fastalex.model.alexnet import AlexNet
from fastalex.model.layers import Conv2dReLU
from fastalex_kernels.augment import BLOCK, Crops, augment_forward
from fastalex_kernels.common.arguments import aligned
from fastalex_kernels.common.backend import use_triton
from fastalex_kernels.common.launch import call
from fastalex_kernels.conv2d.arguments import space_to_depth

Inputs = Sequence[torch.Tensor | None]


def check_batch(images: Any, labels: torch.Tensor, model: AlexNet, augment: Augment | None) -> None:
    """Raise an error that names what is wrong with a batch."""
    if isinstance(images, (tuple, list)):
        if augment is None:
            raise ValueError("images: bytes need augment=, which says what becomes of them")
        augment(*(x[:0] for x in images))
        images = images[0]
    elif not isinstance(images, torch.Tensor):
        raise TypeError(f"images: expected a tensor or bytes, got {type(images).__name__}")
    elif images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        got = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images: expected floats [N, 3, H, W], got {got}")
    else:
        model.check_image_size(images.shape[2], images.shape[3])
    count, expected = len(images), next(model.parameters()).device
    if labels.dtype != torch.int64 or labels.shape != (count,):
        got = f"{labels.dtype} {list(labels.shape)}"
        raise ValueError(f"labels: expected int64 [{count}], got {got}")
    for name, device in (("images", images.device), ("labels", labels.device)):
        if device != expected:
            raise ValueError(f"{name}: expected device {expected}, got {device}")


def signature(x: Any) -> object:
    """All that the recorded launches know of an input."""
    if not isinstance(x, torch.Tensor):
        return type(x)
    return x.shape, x.stride(), x.dtype, x.device, aligned(x)


def input_tensors(images: Any, labels: torch.Tensor, has_kernels: bool) -> Inputs:
    """The tensors that the launches read: the images, or five of bytes; and the labels."""
    labels = labels.contiguous()
    if isinstance(images, torch.Tensor):
        return [images, labels]
    pixels, tops, lefts, mirrors, *colors = images
    if has_kernels:
        mirrors = mirrors.contiguous().view(torch.uint8)
        pixels, tops, lefts = pixels.contiguous(), tops.contiguous(), lefts.contiguous()
    return [pixels, tops, lefts, mirrors, colors[0] if colors else None, labels]


def augmented(
    images: Sequence[Any], augment: Augment, strided: Conv2dReLU | None, dtype: torch.dtype
) -> torch.Tensor:
    """Bytes as the first layer reads them, by the kernel: HWNC maps, or its stride's blocks."""
    pixels, tops, lefts, mirrors, colors = images
    size, conv1 = augment.size, None
    if strided is not None and strided.stride[0] == BLOCK:
        conv1 = strided.sides(size, size), strided.kernel_size[0]
    crops = Crops(tops, lefts, mirrors)
    out = augment_forward(pixels, crops, colors, augment.norm, size, dtype, conv1)
    return out if conv1 is not None else by_torch([out.permute(0, 3, 1, 2)], None, strided, dtype)


def by_torch(
    images: Inputs, augment: Augment | None, strided: Conv2dReLU | None, dtype: torch.dtype
) -> torch.Tensor:
    """Images, or bytes that ``augment`` makes images of, likewise."""
    maps = _maps(augment, strided, *images)
    order = torch.contiguous_format if use_triton(maps) else torch.preserve_format
    out = torch.empty_like(maps, dtype=dtype, memory_format=order)
    call(_write_maps, out, augment, strided, *images)
    return out


def _maps(augment: Augment | None, strided: Conv2dReLU | None, *images: Any) -> torch.Tensor:
    x: torch.Tensor = images[0]
    if augment is not None:
        pixels, tops, lefts, mirrors, *colors = (x for x in images if x is not None)
        with kernels.backend("aten"):
            x = augment(pixels, tops, lefts, mirrors.bool(), *colors)
    if strided is not None:
        (R, S), step = strided.kernel_size, strided.stride[0]
        x = space_to_depth(x, (R, S), (step, step), strided.sides(*x.shape[2:]), 1)
    return x.permute(2, 3, 0, 1)


def _write_maps(
    out: torch.Tensor, augment: Augment | None, strided: Conv2dReLU | None, *images: Any
) -> None:
    out.copy_(_maps(augment, strided, *images))
