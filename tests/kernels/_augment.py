"""Calls of ``augment``, and what each is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import fastalex_kernels as fk
from fastalex_kernels.reference import TOLERANCES

MEANS = (None, "channels", "bytes", "floats", "centre")


@dataclass(frozen=True)
class Case:
    """One call of ``augment``.

    Args:
        shape: images, height and width.
        size, padding, space_to_depth: as the function's.
        mean: one of ``MEANS``: none, one value a channel, an image of uint8 or float32, or the
            centre of one.
        plain: neither colours nor a scale.
        layout: how images and crops lie in memory: contiguous, unaligned or strided.
    """

    name: str
    shape: tuple[int, int, int]
    size: int
    padding: Any = 0
    space_to_depth: int = 4
    mean: str | None = "channels"
    plain: bool = False
    layout: str = "contiguous"
    seed: int = 0

    def __str__(self) -> str:
        return self.name


PAPER = ((0, 3), (0, 3))
CASES = [
    Case("paper", (3, 32, 32), 24, PAPER, mean="floats"),
    Case("caffe", (2, 32, 32), 27),
    Case("owt", (2, 32, 32), 24, 2),
    Case("bytes", (2, 33, 34), 28, PAPER, mean="bytes"),
    Case("odd", (3, 19, 23), 17, ((1, 2), (3, 0)), mean="floats"),
    Case("odd-bytes", (5, 17, 19), 15, ((2, 0), (0, 5)), mean="bytes"),
    Case("centre", (5, 18, 21), 14, ((1, 2), (3, 0)), mean="centre"),
    Case("batch1", (1, 15, 13), 13, 1),
    Case("whole-image", (2, 16, 16), 16, mean=None),
    Case("bare", (2, 15, 16), 12, mean=None, plain=True),
    Case("more-padding-than-pixels", (2, 5, 6), 3, ((9, 6), (5, 14)), mean="floats"),
    Case("unaligned", (2, 16, 18), 14, mean="bytes", layout="unaligned"),
    Case("strided", (3, 16, 18), 13, 2, mean="floats", layout="strided"),
    Case("empty", (0, 16, 16), 12),
    Case("plain", (3, 20, 20), 16, space_to_depth=1),
    Case("plain-odd", (3, 19, 21), 17, space_to_depth=1, mean="floats"),
    Case("plain-centre", (3, 19, 22), 17, space_to_depth=1, mean="centre"),
    Case("plain-padding", (2, 17, 20), 15, ((2, 0), (1, 3)), space_to_depth=1, mean="bytes"),
    Case("plain-one-pixel", (2, 3, 1), 1, space_to_depth=1),
    Case("plain-unaligned", (1, 9, 7), 7, space_to_depth=1, layout="unaligned"),
    Case("plain-empty", (0, 16, 16), 12, space_to_depth=1),
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
    arguments = {
        "images": _lay_out(image(N, H, W, 3), case.layout).to(device),
        "tops": crops[:, 0].to(device),
        "lefts": crops[:, 1].to(device),
        "mirrors": crops[:, 2].bool().to(device),
        "mean": means[case.mean](),
    }
    if not case.plain:
        arguments["colors"] = 40 * torch.randn(N, 3, generator=generator)
        arguments["scale"] = torch.rand(3, generator=generator) + 0.5
    if case.layout != "strided":
        arguments |= {name: arguments[name].contiguous() for name in ("tops", "lefts", "mirrors")}
    moved = {k: v if v is None else v.to(device) for k, v in arguments.items()}
    return moved | {
        "size": case.size, "padding": case.padding, "space_to_depth": case.space_to_depth,
        "centred": case.mean == "centre",
    }  # fmt: skip


def _lay_out(images: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "unaligned":
        return images.new_empty(images.numel() + 1)[1:].view(images.shape).copy_(images)
    if layout == "strided":  # as NCHW
        return images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    return images


def check(case: Case, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """Fail unless every value lies within rounding of the reference; the output."""
    arguments = make(case, device)
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    output = fk.augment(**arguments, dtype=dtype)
    for name, value in before.items():
        assert torch.equal(arguments[name], value), f"{name} was changed"
    expected = fk.reference.augment(**arguments)
    assert output.shape == expected.shape
    assert output.dtype == dtype
    if expected.numel():
        # Every value by itself: one wrong pixel is lost in a norm.
        worst = (output.double() - expected).abs().max() / expected.abs().max()
        assert worst <= TOLERANCES[dtype], f"{case.name} in {dtype}: {worst}"
    assert not output[expected == 0].any(), "padding is not zero"
    return output
