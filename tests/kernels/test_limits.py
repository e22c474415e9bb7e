"""Sizes beyond what a kernel counts in 32 bits, or a GPU starts, are refused before the launch."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

import fastalex_kernels as fk
from fastalex.inspection import offline
from fastalex_kernels.common.backend import interpreted

pytestmark = pytest.mark.skipif(interpreted(), reason="these launches are recorded, not run")

HALF = {"dtype": torch.float16}


def _wide_convolution() -> object:
    return fk.conv2d_relu(torch.empty(700_000, 8, 56, 56, **HALF), torch.empty(8, 8, 1, 1, **HALF))


def _padded_convolution() -> object:
    x, w = torch.empty(40, 8, 1, 1, **HALF), torch.empty(8, 8, 8001, 8001, **HALF)
    return fk.conv2d_relu(x, w, padding=4000)  # one output pixel, and a weight past 2^31


def _far_padding() -> object:
    x, w = torch.empty(9_000_000, 1, 1, 1, **HALF), torch.empty(1, 1, 301, 1, **HALF)
    return fk.conv2d_relu(x, w, padding=((300, 0), (0, 0)))  # rows from -300 * 9,000,000 on


def _groups() -> object:
    x, w = torch.empty(1, 70_000, 1, 1, **HALF), torch.empty(70_000, 1, 1, 1, **HALF)
    return fk.conv2d_relu(x, w, groups=70_000)


def _linear(rows: int) -> object:
    return fk.linear_relu_dropout(torch.empty(rows, 8, **HALF), torch.empty(8, 8, **HALF), p=0.0)


def _augment(images: int) -> object:
    x = torch.empty(images, 256, 256, 3, dtype=torch.uint8)
    first, mirrors = torch.empty(images, dtype=torch.int64), torch.empty(images, dtype=torch.bool)
    return fk.augment(x, fk.Crops(first, first, mirrors))


REFUSED: dict[str, Callable[[], object]] = {
    "rows of a convolution": _wide_convolution,
    "a weight": _padded_convolution,
    "rows in the padding": _far_padding,
    "groups": _groups,
    "rows of a product": lambda: _linear(65535 * 128 + 1),
    "rows of LRN": lambda: fk.lrn_max_pool2d(torch.empty(2**28, 8, 3, 3, **HALF)),
    "lines of LRN": lambda: fk.lrn_max_pool2d(torch.empty(1, 8, 600_000, 3)),
    "columns of LRN": lambda: fk.lrn_max_pool2d(torch.empty(1, 8, 3, 400_000, **HALF)),
    "lines of pooling": lambda: fk.max_pool2d(torch.empty(1, 8, 131_073, 3)),
    "images": lambda: _augment(90_000_000),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_too_large_is_refused(name: str) -> None:
    launches: list[offline.Launch] = []
    with pytest.raises(ValueError) as error:
        launches += offline.record("sm_90", REFUSED[name])
    message = str(error.value)
    assert re.match(
        r"input: too large for one launch of \w+_kernel, which would count to ", message
    )
    assert "\n" not in message
    assert not launches


ACCEPTED: dict[str, Callable[[], object]] = {
    "rows of a product": lambda: _linear(65535 * 128),
    "lines of pooling": lambda: fk.max_pool2d(torch.empty(1, 8, 131_071, 3)),
    "images": lambda: _augment(80_000_000),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_little_less_is_not(name: str) -> None:
    assert offline.record("sm_90", ACCEPTED[name])
