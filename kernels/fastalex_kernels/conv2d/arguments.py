"""What a caller may pass as a convolution's arguments, and how a stride is removed from them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.arguments import check_groups, check_tensor, expect
from ..common.layout import as_nchw

Padding = tuple[tuple[int, int], tuple[int, int]]  # ((top, bottom), (left, right))


def space_to_depth(
    input: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: Padding,
    groups: int,
) -> Tensor:
    """The same convolution's input at stride 1 and padding 0, over blocks of ``stride`` pixels.

    Differentiable torch operations, so the gradient passes through them. The weight's part is
    ``space_to_depth_weight``.
    """
    (N, channels, H, W), (R, S), (sh, sw) = input.shape, kernel_size, stride
    (top, bottom), (left, right) = padding
    P, Q = (H + top + bottom - R) // sh + 1, (W + left + right - S) // sw + 1
    height, width = P + -(-R // sh) - 1, Q + -(-S // sw) - 1
    bottom, right = max(height * sh - H - top, 0), max(width * sw - W - left, 0)
    x = F.pad(input, (left, right, top, bottom))
    x = x.narrow(2, 0, height * sh).narrow(3, 0, width * sw)
    x = x.reshape(N, groups, channels // groups, height, sh, width, sw).permute(3, 5, 0, 1, 4, 6, 2)
    return as_nchw(x.reshape(height, width, N, channels * sh * sw))


def space_to_depth_weight(weight: Tensor, stride: tuple[int, int]) -> Tensor:
    """[K, sh * sw * C, ceil(R / sh), ceil(S / sw)] of a weight [K, C, R, S], differentiable."""
    (K, C, R, S), (sh, sw) = weight.shape, stride
    rows, columns = -(-R // sh), -(-S // sw)
    w = F.pad(weight, (0, columns * sw - S, 0, rows * sh - R))
    w = w.reshape(K, C, rows, sh, columns, sw).permute(2, 4, 3, 5, 1, 0)
    return w.reshape(rows, columns, sh * sw * C, K).permute(3, 2, 0, 1)


def depth_to_space_weight(packed: Tensor, shape: torch.Size, stride: tuple[int, int]) -> Tensor:
    """A weight of ``shape`` [K, C, R, S] of what ``pack_weight`` made of it with a stride."""
    (K, C, R, S), (sh, sw) = shape, stride
    rows, columns = packed.shape[:2]
    w = packed.reshape(rows, columns, sh, sw, C, K).permute(5, 4, 0, 2, 1, 3)
    return w.reshape(K, C, rows * sh, columns * sw)[:, :, :R, :S]


def spell_out(padding: Any, stride: Any) -> tuple[Padding, tuple[int, int]]:
    """Spell out the accepted forms of padding and stride, or say what is wrong with them."""
    steps = _pair(stride)
    if not _is_pair_of_ints(steps):
        raise TypeError(f"stride: expected an int or (height, width), got {stride!r}")
    expect(min(steps) >= 1, "stride", "at least 1, got {}", stride)
    sides = _pair(padding)
    sides = tuple(map(_pair, sides)) if isinstance(sides, tuple) else ()
    if len(sides) != 2 or not all(map(_is_pair_of_ints, sides)):
        forms = "an int, (height, width) or ((top, bottom), (left, right))"
        raise TypeError(f"padding: expected {forms}, got {padding!r}")
    expect(min(map(min, sides)) >= 0, "padding", "no negative value, got {}", padding)
    return sides, steps


def _pair(value: Any) -> Any:
    return (
        (value, value)
        if isinstance(value, int)
        else tuple(value)
        if isinstance(value, list)
        else value
    )


def _is_pair_of_ints(value: Any) -> bool:
    return isinstance(value, tuple) and [type(part) for part in value] == [int, int]


def check(
    input: Tensor, weight: Tensor, bias: Tensor | None, padding: Padding, groups: int
) -> None:
    """Raise unless the arguments fit."""
    check_tensor("input", input)
    check_tensor("weight", weight, (input.dtype,), input.device)
    expect(input.dim() == 4, "input", "[N, C, H, W], got shape {}", tuple(input.shape))
    is_kernel, shape = weight.dim() == 4 and min(weight.shape) > 0, tuple(weight.shape)
    expect(is_kernel, "weight", "[out, in / groups, height, width], got shape {}", shape)
    check_groups(groups, shape[0])
    channels = shape[1] * groups
    expected = "{} channels (weight {}, groups {}), got {}"
    fits = input.shape[1] == channels
    expect(fits, "input", expected, channels, shape, groups, input.shape[1])
    if bias is not None:
        check_tensor("bias", bias, (input.dtype,), input.device, shape[:1])
    sizes = zip(("height", "width"), input.shape[2:], weight.shape[2:], padding, strict=True)
    for name, size, kernel, sides in sizes:
        expected = "a {} of at least {} with padding {}, got {}"
        expect(size + sum(sides) >= kernel, "input", expected, name, kernel, sides, size)
