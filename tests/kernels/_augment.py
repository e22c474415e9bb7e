"""Calls of ``augment``, and what each is measured against."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

import fastalex_kernels as fk
from fastalex_kernels.augment import augment_forward
from fastalex_kernels.common.backend import interpreted
from fastalex_kernels.common.layout import as_nchw
from fastalex_kernels.conv2d.arguments import space_to_depth, spell_out
from fastalex_kernels.reference import TOLERANCES

MEANS = (None, "channels", "bytes", "floats", "centre")


@dataclass(frozen=True)
class Case:
    """One call of ``augment``.

    Args:
        shape: images, height and width.
        size: as the function's.
        padding: of a convolution 11 x 11 with stride 4 that reads its output as blocks of pixels;
            None for an output in pixels, which is what the function gives.
        mean: one of ``MEANS``: none, one value a channel, an image of uint8 or float32, or the
            centre of one.
        plain: neither colours nor a scale.
        layout: how images and crops lie in memory: contiguous, unaligned or strided.
    """

    name: str
    shape: tuple[int, int, int]
    size: int
    padding: Any = None
    mean: str | None = "channels"
    plain: bool = False
    layout: str = "contiguous"
    seed: int = 0

    def __str__(self) -> str:
        return self.name


PAPER = ((0, 3), (0, 3))
PLAIN = [
    Case("plain", (3, 20, 20), 16),
    Case("odd", (3, 19, 21), 17, mean="floats"),
    Case("centre", (3, 19, 22), 17, mean="centre"),
    Case("bytes", (2, 17, 20), 15, mean="bytes"),
    Case("bare", (2, 15, 16), 12, mean=None, plain=True),
    Case("one-pixel", (2, 3, 1), 1),
    Case("strided", (3, 16, 18), 13, mean="floats", layout="strided"),
    Case("unaligned", (1, 9, 7), 7, layout="unaligned"),
    Case("empty", (0, 16, 16), 12),
]
BLOCKS = [
    Case("paper", (3, 32, 32), 24, PAPER, mean="floats"),
    Case("caffe", (2, 32, 32), 27, 0),
    Case("owt", (2, 32, 32), 24, 2),
    Case("bytes", (2, 33, 34), 28, PAPER, mean="bytes"),
    Case("odd", (3, 19, 23), 17, ((1, 2), (3, 0)), mean="floats"),
    Case("odd-bytes", (5, 17, 19), 15, ((2, 0), (0, 5)), mean="bytes"),
    Case("centre", (5, 18, 21), 14, ((1, 2), (3, 0)), mean="centre"),
    Case("batch1", (1, 15, 13), 13, 1),
    Case("whole-image", (2, 16, 16), 16, 0, mean=None),
    Case("bare", (2, 15, 16), 12, 0, mean=None, plain=True),
    Case("more-padding-than-pixels", (2, 5, 6), 3, ((9, 6), (5, 14)), mean="floats"),
    Case("unaligned", (2, 16, 18), 14, 0, mean="bytes", layout="unaligned"),
    Case("empty", (0, 16, 16), 12, 0),
]


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of a case; some crops lie beyond their image."""
    N, H, W = case.shape
    generator = torch.Generator().manual_seed(case.seed)

    def uniform(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    def image(*shape: int) -> torch.Tensor:
        return uniform(0, 256, *shape).to(torch.uint8)

    crops = torch.stack(
        [uniform(-2, H - case.size + 3, N), uniform(-2, W - case.size + 3, N), uniform(0, 2, N)], 1
    )
    means = {
        None: lambda: None,
        "channels": lambda: 255 * torch.rand(3, generator=generator),
        "bytes": lambda: image(H, W, 3),
        "floats": lambda: 255 * torch.rand(H, W, 3, generator=generator),
        "centre": lambda: 255 * torch.rand(H, W, 3, generator=generator),
    }

    def place(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.to(device)

    images = _lay_out(image(N, H, W, 3), case.layout).to(device)
    mean = place(means[case.mean]())
    colors = scale = None
    if not case.plain:
        colors = place(40 * torch.randn(N, 3, generator=generator))
        scale = place(torch.rand(3, generator=generator) + 0.5)
    places = [crops[:, 0].to(device), crops[:, 1].to(device), crops[:, 2].bool().to(device)]
    if case.layout != "strided":
        places = [x.contiguous() for x in places]
    norm = fk.PixelNorm(mean, scale, case.mean == "centre")
    return {
        "images": images, "crops": fk.Crops(*places), "colors": colors, "norm": norm,
        "size": case.size,
    }  # fmt: skip


def _lay_out(images: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "unaligned":
        return images.new_empty(images.numel() + 1)[1:].view(images.shape).copy_(images)
    if layout == "strided":  # as NCHW
        return images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    return images


def blocks(arguments: dict[str, Any], padding: Any, dtype: torch.dtype) -> torch.Tensor:
    """The kernel's blocks of pixels, [N, 48, P, Q], as conv1 reads them."""
    tops, lefts, mirrors = arguments["crops"]
    given = arguments | {"crops": fk.Crops(tops, lefts, mirrors.view(torch.uint8))}
    stored = torch.float32 if interpreted() and dtype == torch.bfloat16 else dtype
    made = augment_forward(**given, dtype=stored, conv1=(spell_out(padding, 4)[0], 11))
    return as_nchw(made).to(dtype)


def check(case: Case, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """Fail unless every value lies within rounding of the reference; the output."""
    arguments = make(case, device)
    before = copy.deepcopy(arguments)
    if case.padding is None:
        output = fk.augment(**arguments, dtype=dtype)
    else:
        output = blocks(arguments, case.padding, dtype)
    for now, then in zip(tree_leaves(arguments), tree_leaves(before), strict=True):
        assert torch.equal(now, then) if isinstance(now, torch.Tensor) else now == then, (
            "an argument was changed"
        )
    expected = fk.reference.augment(**arguments)
    if case.padding is not None:
        sides = spell_out(case.padding, 4)[0]
        expected = space_to_depth(expected, (11, 11), (4, 4), sides, 1)
    assert output.shape == expected.shape
    assert output.dtype == dtype
    if expected.numel():
        # Every value by itself: one wrong pixel is lost in a norm.
        worst = (output.double() - expected).abs().max() / expected.abs().max()
        assert worst <= TOLERANCES[dtype], f"{case.name} in {dtype}: {worst}"
    assert not output[expected == 0].any(), "padding is not zero"
    return output
