"""What a caller may pass as a convolution's arguments, and how a stride is removed from them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastalex_kernels.common.arguments import check_floating, check_like
from fastalex_kernels.common.layout import as_nchw

Padding = tuple[tuple[int, int], tuple[int, int]]  # ((top, bottom), (left, right))


def space_to_depth(
    input: torch.Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: Padding,
    groups: int,
) -> torch.Tensor:
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


def space_to_depth_weight(weight: torch.Tensor, stride: tuple[int, int]) -> torch.Tensor:
    """[K, sh * sw * C, ceil(R / sh), ceil(S / sw)] of a weight [K, C, R, S], differentiable."""
    (K, C, R, S), (sh, sw) = weight.shape, stride
    rows, columns = -(-R // sh), -(-S // sw)
    w = F.pad(weight, (0, columns * sw - S, 0, rows * sh - R))
    w = w.reshape(K, C, rows, sh, columns, sw).permute(2, 4, 3, 5, 1, 0)
    return w.reshape(rows, columns, sh * sw * C, K).permute(3, 2, 0, 1)


def depth_to_space_weight(
    packed: torch.Tensor, shape: torch.Size, stride: tuple[int, int]
) -> torch.Tensor:
    """A weight of ``shape`` [K, C, R, S] of what ``pack_weight`` made of it with a stride."""
    (K, C, R, S), (sh, sw) = shape, stride
    rows, columns = packed.shape[:2]
    w = packed.reshape(rows, columns, sh, sw, C, K).permute(5, 4, 0, 2, 1, 3)
    return w.reshape(K, C, rows * sh, columns * sw)[:, :, :R, :S]


def spell_out(padding: Any, stride: Any) -> tuple[Padding, tuple[int, int]]:
    """Spell out the accepted forms of padding and stride, or say what is wrong with them."""
    integer = lambda v: isinstance(v, int) and not isinstance(v, bool)  # noqa: E731
    pair = (stride, stride) if integer(stride) else stride
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(map(integer, pair))):
        raise TypeError(f"stride: expected an int or (height, width), got {stride!r}")
    if min(pair) < 1:
        raise ValueError(f"stride: expected at least 1, got {stride!r}")
    sides = (padding, padding) if integer(padding) else padding
    if isinstance(sides, (tuple, list)) and len(sides) == 2:
        sides = tuple(
            (v, v) if integer(v) else tuple(v) if isinstance(v, (tuple, list)) else v for v in sides
        )
        if all(isinstance(v, tuple) and len(v) == 2 and all(map(integer, v)) for v in sides):
            if min(min(v) for v in sides) < 0:
                raise ValueError(f"padding: expected no negative value, got {padding!r}")
            return sides, (pair[0], pair[1])  # type: ignore[return-value]
    raise TypeError(
        "padding: expected an int, (height, width) or ((top, bottom), (left, right)), "
        f"got {padding!r}"
    )


def check(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: Padding,
    groups: int,
) -> None:
    """Raise unless the arguments fit."""
    check_floating("input", input)
    check_like("weight", weight, input)
    if input.dim() != 4:
        raise ValueError(f"input: expected [N, C, H, W], got shape {tuple(input.shape)}")
    if weight.dim() != 4 or min(weight.shape) < 1:
        raise ValueError(
            f"weight: expected [out, in / groups, height, width], got shape {tuple(weight.shape)}"
        )
    if not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"groups: expected a divisor of the {weight.shape[0]} output channels, got {groups!r}"
        )
    if input.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"input: expected {weight.shape[1] * groups} channels "
            f"(weight {tuple(weight.shape)}, groups {groups}), got {input.shape[1]}"
        )
    if bias is not None:
        check_like("bias", bias, weight)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, size, kernel, sides in zip(
        ("height", "width"), input.shape[2:], weight.shape[2:], padding, strict=True
    ):
        if size + sum(sides) < kernel:
            raise ValueError(
                f"input: {name} {size} with padding {sides} is below the kernel's {kernel}"
            )
