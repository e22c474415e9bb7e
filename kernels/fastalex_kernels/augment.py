"""From images as bytes to what the first convolution reads, in one pass.

    y[n, c, h, w] = (image[n, top + h, left + w', c] + color[n, c] - mean[c]) * scale[c]
    w' = size - 1 - w where the image is mirrored, else w;  zero where padding lies

A mean image is cropped and mirrored with the image it is taken from (P§2). The pass reads each byte
of a crop and writes each value once, and is bound by memory as long as it issues few instructions:

* A thread takes an item: 16 pixels, 48 values, as 4 runs of 4 pixels of a line. The 12 bytes of a
  run are contiguous, mirrored or not, and start anywhere, so 2 aligned pairs of words are read, a
  third where it is needed, and shifted; what neighbouring items share comes from the cache.
* A mirrored run has its pixels exchanged while they are still bytes, 4 to a register.
* An item's 12 words are its values in the order in which they are stored, so three tiles of
  [items, 16] are widened, scaled and stored, 16 bytes at a time and whole sectors of 32.

Layout: images [N, H, W, 3]. An item is 16 pixels of a line, and the output lies channels last,
[N, H, W, 3]; or it is a block of 4 x 4 pixels, the output HWNC [P, Q, N, 48] of
conv2d.arguments.space_to_depth, channel (row * 4 + column) * 3 + color.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import aten
from .common.arguments import (
    aligned,
    check_dtype,
    check_int,
    check_tensor,
    expect,
)
from .common.backend import interpreted, target, use_triton
from .common.blocks import join8
from .common.dependent import wait_for_predecessor
from .common.launch import call, launch
from .conv2d.arguments import Padding

BLOCK = 4  # the stride of a first convolution that reads blocks of pixels
_ITEMS = 128  # of a program, one a thread: 4 warps
_INTERPRETER_ITEMS = 4096  # where an operation costs the same at any size


class Crops(NamedTuple):
    """Where a part is cut out of each image.

    Args:
        tops, lefts: int32 or int64 [N], the first line and column in pixels.
        mirrors: bool or uint8 [N], whether it is mirrored left to right.
    """

    tops: Tensor
    lefts: Tensor
    mirrors: Tensor


class PixelNorm(NamedTuple):
    """(pixel - mean) * scale, on the scale of 0 to 255.

    Args:
        mean: float32 [3], or an image, uint8 or float32 [H, W, 3], cropped and mirrored with each
            image. None subtracts nothing.
        scale: float32 [3], one over the standard deviation; None is 1.
        centred: whether it is the centre of a mean image that is subtracted from every crop,
            wherever that was cut and mirrored or not.
    """

    mean: Tensor | None = None
    scale: Tensor | None = None
    centred: bool = False


_PLAIN = PixelNorm()


@triton.jit
def _load_pair(ptr, byte, size, inside):
    """Bytes byte .. byte + 7 of an image of ``size`` bytes, and 0 for those beyond it.

    ``byte`` is a multiple of 8.
    """
    mask = inside & (byte >= 0) & (byte < size)
    pair_ptr = ptr.to(tl.pointer_type(tl.uint64), bitcast=True)
    return tl.load(pair_ptr + (byte >> 3), mask=mask, other=0)


@triton.jit
def _load_run(ptr, byte, size, inside):
    """The 12 bytes from ``byte`` on, as three words."""
    first = byte & -8
    p0 = _load_pair(ptr, first, size, inside)
    p1 = _load_pair(ptr, first + 8, size, inside)
    p2 = _load_pair(ptr, first + 16, size, inside & ((byte & 7) > 4))
    odd = (byte & 4) != 0
    low = tl.where(odd, (p0 >> 32) | (p1 << 32), p0)
    high = tl.where(odd, (p1 >> 32) | (p2 << 32), p1)
    shift = ((byte & 3) * 8).to(tl.uint64)
    w0 = (low >> shift).to(tl.uint32)
    w1 = (((low >> 32) | (high << 32)) >> shift).to(tl.uint32)
    return w0, w1, (high >> shift).to(tl.uint32)


@triton.jit
def _exchange_pixels(w0, w1, w2):
    """The run's pixels in reverse order: its bytes 9 10 11 6 | 7 8 3 4 | 5 0 1 2."""
    v0 = (w2 >> 8) | ((w1 << 8) & 0xFF000000)
    v1 = (w1 >> 24) | ((w2 & 255) << 8) | ((w0 >> 24) << 16) | (w1 << 24)
    v2 = ((w1 >> 8) & 255) | (w0 << 8)
    return v0, v1, v2


@triton.jit
def _bytes(w0, w1, w2, w3, ITEMS: tl.constexpr):
    """The bytes of four words of each item as float32 [ITEMS, 16]."""
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [ITEMS, 4, 1])
    shifts = (tl.arange(0, 4) * 8)[None, None, :]
    return tl.reshape((words >> shifts) & 255, [ITEMS, 16]).to(tl.float32)


@triton.jit
def _load_mean(mean_ptr, first, step, column, inside, SIZE: tl.constexpr):
    """A run's 12 values of a mean image, in the order of the output.

    ``first`` is where those of its first pixel are, ``step`` leads to its next pixel.
    """
    values = ()
    for pixel in tl.static_range(4):
        mask = inside & ((column + pixel).to(tl.uint32) < SIZE)  # nor negative
        ptrs = mean_ptr + (first + step * pixel)
        for channel in tl.static_range(3):
            mean = tl.load(ptrs + channel, mask=mask, other=0).to(tl.float32)
            values += (mean,)  # type: ignore[assignment]
    return values


@triton.jit
def _columns16(v, i: tl.constexpr, ITEMS: tl.constexpr):
    """[ITEMS, 16] of 16 columns, v[i] the first."""
    halves = tl.join(join8(v[i : i + 8], ITEMS), join8(v[i + 8 : i + 16], ITEMS))
    return tl.reshape(tl.permute(halves, 0, 2, 1), [ITEMS, 16])


@triton.jit
def _load3(ptr, index, PRESENT: tl.constexpr, DEFAULT: tl.constexpr):
    """Row ``index`` of a float32 [rows, 3], or the default three times."""
    if PRESENT:
        ptr += index * 3
        v0, v1, v2 = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2)
    else:
        v0, v1, v2 = DEFAULT, DEFAULT, DEFAULT
    return v0, v1, v2


@triton.jit
def _augment_kernel(
    images_ptr,  # uint8 [N, H, W, 3], in whole aligned words of 8 bytes
    tops_ptr,  # int [N]
    lefts_ptr,  # int [N]
    mirrors_ptr,  # uint8 [N]
    colors_ptr,  # float32 [N, 3], read where HAS_COLORS
    mean_ptr,  # float32 [3] where HAS_MEAN, uint8 or float32 [H, W, 3] where HAS_MEAN_IMAGE
    scale_ptr,  # float32 [3], read where HAS_SCALE
    out_ptr,  # [P, Q, N, 48] where COLUMNS is 4, else [N, P, WIDTH, 3]
    N,
    H: tl.constexpr,
    W: tl.constexpr,
    SIZE: tl.constexpr,
    P: tl.constexpr,  # items along the height
    Q: tl.constexpr,  # items along the width
    WIDTH: tl.constexpr,  # pixels of an output line
    PAD_TOP: tl.constexpr,
    PAD_LEFT: tl.constexpr,
    COLUMNS: tl.constexpr,  # an item is 16 / COLUMNS lines of this many pixels
    HAS_COLORS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_MEAN_IMAGE: tl.constexpr,
    CENTRED: tl.constexpr,  # the mean image's centre is subtracted, neither moved nor mirrored
    HAS_SCALE: tl.constexpr,
    ITEMS: tl.constexpr,
):
    wait_for_predecessor()
    pid = tl.program_id(0)
    n = pid % N
    item = pid // N * ITEMS + tl.arange(0, ITEMS)
    live = item < P * Q
    h = item // Q * (16 // COLUMNS) - PAD_TOP
    w = item % Q * COLUMNS - PAD_LEFT
    # A crop that would leave the image is moved inside.
    top = tl.minimum(tl.maximum(tl.load(tops_ptr + n), 0), H - SIZE).to(tl.int32)
    left = tl.minimum(tl.maximum(tl.load(lefts_ptr + n), 0), W - SIZE).to(tl.int32)
    mirrored = tl.load(mirrors_ptr + n) != 0
    s0, s1, s2 = _load3(scale_ptr, 0, HAS_SCALE, 1.0)
    c0, c1, c2 = _load3(colors_ptr, n.to(tl.int64), HAS_COLORS, 0.0)
    m0, m1, m2 = _load3(mean_ptr, 0, HAS_MEAN, 0.0)
    b0, b1, b2 = (c0 - m0) * s0, (c1 - m1) * s1, (c2 - m2) * s2

    # An image need not start at a multiple of 8 bytes: count from the one before.
    start = n.to(tl.int64) * (H * W * 3)
    skip = (start % 8).to(tl.int32)
    image_ptr = images_ptr + (start - skip)
    words = ()
    means = ()
    for run in tl.static_range(4):
        row = h + 4 * run // COLUMNS
        column = w + 4 * run % COLUMNS
        inside = live & (row >= 0) & (row < SIZE) & (column > -4) & (column < SIZE)
        source = left + tl.where(mirrored, SIZE - 4 - column, column)
        byte = skip + ((top + row) * W + source) * 3
        w0, w1, w2 = _load_run(image_ptr, byte, skip + H * W * 3, inside)
        v0, v1, v2 = _exchange_pixels(w0, w1, w2)
        w0 = tl.where(mirrored, v0, w0)
        w1 = tl.where(mirrored, v1, w1)
        w2 = tl.where(mirrored, v2, w2)
        words += (w0, w1, w2)  # type: ignore[assignment]
        if HAS_MEAN_IMAGE:
            mean_row, source, step = (H - SIZE) // 2 + row, (W - SIZE) // 2 + column, 3
            if not CENTRED:
                mean_row = top + row
                source = left + tl.where(mirrored, SIZE - 1 - column, column)
                step = tl.where(mirrored, -3, 3)
            first = (mean_row * W + source) * 3
            means += _load_mean(mean_ptr, first, step, column, inside, SIZE)

    # What differs between an item's values, joined as they are: a column's number would be computed
    # with by every thread, on Triton 3.6.
    scales = ()
    biases = ()
    insides = ()
    each = tl.zeros([ITEMS], tl.float32)
    for pixel in tl.static_range(16):
        row = h + pixel // COLUMNS
        column = w + pixel % COLUMNS
        inside = (row >= 0) & (row < SIZE) & (column >= 0) & (column < SIZE)
        insides += (inside, inside, inside)  # type: ignore[assignment]
        scales += (each + s0, each + s1, each + s2)  # type: ignore[assignment]
        biases += (each + b0, each + b1, each + b2)  # type: ignore[assignment]

    if COLUMNS == 4:
        offset = (item.to(tl.int64) * N + n) * 48
    else:
        offset = ((n.to(tl.int64) * P + item // Q) * WIDTH + item % Q * 16) * 3
    for tile in tl.static_range(3):
        x = _bytes(
            words[4 * tile], words[4 * tile + 1], words[4 * tile + 2], words[4 * tile + 3], ITEMS
        )
        value = tile * 16 + tl.arange(0, 16)
        if HAS_MEAN_IMAGE:
            x -= _columns16(means, 16 * tile, ITEMS)
        y = x * _columns16(scales, 16 * tile, ITEMS) + _columns16(biases, 16 * tile, ITEMS)
        y = tl.where(_columns16(insides, 16 * tile, ITEMS), y, 0.0).to(out_ptr.dtype.element_ty)
        mask = live[:, None]
        if WIDTH % COLUMNS != 0:
            column = w[:, None] + (value // 3 % COLUMNS)[None, :]
            mask = mask & (column < WIDTH - PAD_LEFT)
        tl.store(out_ptr + offset[:, None] + value[None, :], y, mask=mask)


def augment_forward(
    images: Tensor,
    crops: Crops,
    colors: Tensor | None,
    norm: PixelNorm,
    size: int,
    dtype: torch.dtype,
    conv1: tuple[Padding, int] | None = None,
) -> Tensor:
    """``augment`` of contiguous tensors, ``mirrors`` uint8, into [N, size, size, 3].

    Where ``conv1`` gives padding and kernel size of a convolution with stride 4, into the blocks
    that it reads, [P, Q, N, 48], without those behind the last that its windows reach.
    """
    (N, H, W, _), (mean, scale, centred) = images.shape, norm
    if images.numel() % 8 or not aligned(images):
        words = images.new_zeros(images.numel() + 7)  # all of the last 8 bytes can be read
        call(words[: images.numel()].view(images.shape).copy_, images)
        images = words
    if conv1 is None:
        top = left = 0
        P, Q, width = size, triton.cdiv(size, 16), size
        out = images.new_empty((N, size, size, 3), dtype=dtype)
    else:
        ((top, bottom), (left, right)), rest = conv1[0], -conv1[1] % BLOCK
        P, Q = (size + top + bottom + rest) // BLOCK, (size + left + right + rest) // BLOCK
        width = Q * BLOCK
        out = images.new_empty((P, Q, N, 48), dtype=dtype)
    items = _INTERPRETER_ITEMS if target(images.device) == "interpreter" else _ITEMS
    launch(
        _augment_kernel, (triton.cdiv(P * Q, items) * N,), images, *crops,
        *(images if x is None else x for x in (colors, mean, scale)), out, N, H=H, W=W, SIZE=size,
        P=P, Q=Q, WIDTH=width, PAD_TOP=top, PAD_LEFT=left, COLUMNS=16 if conv1 is None else BLOCK,
        HAS_COLORS=colors is not None, HAS_MEAN=mean is not None and mean.dim() == 1,
        HAS_MEAN_IMAGE=mean is not None and mean.dim() == 3, CENTRED=centred,
        HAS_SCALE=scale is not None, ITEMS=items, num_warps=4, counted=max(P * Q, H * W * 3),
    )  # fmt: skip
    return out


@torch.no_grad()
def augment(
    images: Tensor,
    crops: Crops,
    colors: Tensor | None = None,
    norm: PixelNorm = _PLAIN,
    size: int = 224,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Crop, mirror, colour and normalise a batch of images.

        (image[top + h, left + w, c] + color[c] - mean[c]) * scale[c], mirrored where asked

    Every tensor is on the images' device and no value is read by the host, so that a CUDA graph can
    hold the call. A crop that would leave its image is moved inside, on every backend.

    Args:
        images: uint8 [N, H, W, 3]; copied first where not contiguous.
        crops: where each is cut, and which are mirrored.
        colors: float32 [N, 3], added to every pixel, on the scale of 0 to 255; None adds nothing.
        norm: mean and scale.
        size: side of the crop in pixels, at most H and W.
        dtype: float32, bfloat16, float16, or float64, which runs on ATen.

    Returns:
        [N, 3, size, size], channels last in memory. Computed in float32, rounded once. It has no
        gradient.

    Raises:
        TypeError: for a wrong type or dtype.
        ValueError: for a wrong shape, device, or a value out of range.

    Source: P§2 and P§4.1.
    """
    _check(images, crops, colors, norm, size)
    check_dtype("dtype", dtype)
    if dtype == torch.float64 or not use_triton(images):
        crops = crops._replace(mirrors=crops.mirrors.bool())
        return aten.augment(images, crops, colors, norm, size, dtype).permute(0, 3, 1, 2)
    tops, lefts, mirrors = (x.contiguous() for x in crops)
    crops = Crops(tops, lefts, mirrors.view(torch.uint8))
    colors, mean, scale = (None if x is None else x.contiguous() for x in (colors, *norm[:2]))
    norm = PixelNorm(mean, scale, norm.centred)
    # The interpreter cannot round to bfloat16.
    stored = torch.float32 if interpreted() and dtype == torch.bfloat16 else dtype
    out = augment_forward(images.contiguous(), crops, colors, norm, size, stored)
    return out.to(dtype).permute(0, 3, 1, 2)


def _check(images: Tensor, crops: Crops, colors: Tensor | None, norm: PixelNorm, size: int) -> None:
    check_tensor("images", images, (torch.uint8,))
    shape, device = tuple(images.shape), images.device
    is_bytes = len(shape) == 4 and shape[3] == 3
    expect(is_bytes, "images", "[N, H, W, 3], got shape {}", shape)
    expect(math.prod(shape[1:]) <= 2**30, "images", "at most 1 GiB each, got shape {}", shape)
    check_int("size", size, 1, min(shape[1:3]))
    for name, x in (("tops", crops.tops), ("lefts", crops.lefts)):
        check_tensor(name, x, (torch.int32, torch.int64), device, shape[:1])
    check_tensor("mirrors", crops.mirrors, (torch.bool, torch.uint8), device, shape[:1])
    if colors is not None:
        check_tensor("colors", colors, (torch.float32,), device, (shape[0], 3))
    if norm.mean is not None:
        check_tensor("mean", norm.mean, (torch.float32, torch.uint8), device, (3,), shape[1:])
        if norm.mean.dim() == 1:
            check_dtype("mean", norm.mean.dtype, (torch.float32,))
    if norm.scale is not None:
        check_tensor("scale", norm.scale, (torch.float32,), device, (3,))
