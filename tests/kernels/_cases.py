"""The calls that every backend, dtype and machine is tried on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from ._oracle import Case, conv, linear, lrn, pool, variants

LAYOUTS = ["reversed", "channels_last", "hwnc", "expanded", "sliced", "unaligned"]

CONV = [
    conv("1x1", (3, 5, 6, 7), 4, 1),
    conv("3x3", (2, 4, 6, 5), 6, 3),
    conv("batch1", (1, 7, 6, 6), 9, 3, padding=1),
    conv("batch16", (16, 17, 4, 4), 18, 3, padding=1),
    conv("batch128", (128, 4, 3, 3), 5, 2, padding=1),
    conv("groups2", (3, 8, 7, 5), 12, 5, padding=2, groups=2),
    conv("depthwise", (2, 6, 5, 4), 6, 3, padding=1, groups=6),
    conv("rectangular", (2, 3, 5, 9), 4, (2, 5), padding=(1, 2)),
    conv("asymmetric", (2, 3, 5, 6), 4, 3, padding=((0, 3), (2, 1))),
    conv("padding-above-kernel", (2, 3, 4, 3), 5, 2, padding=3),
    conv("padding-only", (1, 2, 1, 1), 3, 3, padding=((2, 2), (2, 4))),
    conv("whole-image", (3, 4, 5, 6), 7, (5, 6)),
    conv("stride2", (3, 4, 8, 7), 6, 3, stride=2, padding=1),
    conv("strides", (2, 6, 11, 9), 4, (4, 3), stride=(3, 2), padding=((1, 0), (0, 2)), groups=2),
    conv("stride-above-kernel", (2, 3, 8, 9), 4, 2, stride=3),
    conv("stride-leaves-rest", (2, 3, 10, 12), 4, 3, stride=4),
    conv("conv1", (2, 3, 31, 27), 16, 11, stride=4, padding=((0, 3), (0, 3))),
    conv("without-bias", (2, 4, 5, 5), 6, 3, padding=1, bias=False),
    conv("without-relu", (2, 4, 5, 5), 6, 3, padding=1, relu=False),
    conv("bare", (2, 4, 5, 5), 6, 3, bias=False, relu=False),
    conv("empty", (0, 4, 5, 5), 6, 3, padding=1),
    conv("empty-stride", (0, 3, 9, 9), 6, 3, stride=2),
]
CONV_LAYOUTS = variants(
    conv("layout", (3, 6, 5, 4), 8, 3, padding=1, groups=2), layout=LAYOUTS
) + variants(
    conv("stride-layout", (2, 3, 7, 8), 4, 3, stride=2), layout=["sliced", "channels_last"]
)
FROZEN: list[Any] = [
    ("weight", "bias"),
    ("input",),
    ("input", "weight"),
    ("input", "bias"),
    ("bias",),
    ("input", "weight", "bias"),
]
CONV_FROZEN = (
    variants(conv("frozen", (2, 4, 5, 4), 6, 3, padding=1), frozen=FROZEN)
    + variants(conv("frozen-bare", (2, 4, 5, 4), 6, 3, relu=False), frozen=FROZEN)
    + variants(conv("frozen-stride", (2, 3, 7, 7), 4, 3, stride=2), frozen=FROZEN[:2])
)

LRN = [
    lrn("paper", (3, 12, 7, 9), alpha=1.0),
    lrn("small-alpha", (2, 8, 5, 5), alpha=1e-4),
    lrn("large-alpha", (2, 11, 6, 5), alpha=50.0, k=1.0),
    lrn("batch1", (1, 7, 5, 6), alpha=2.0),
    lrn("batch16", (16, 24, 5, 5), alpha=1.0, groups=2),
    lrn("batch128", (128, 6, 3, 3), alpha=1.0),
    lrn("groups3", (2, 15, 5, 7), alpha=3.0, groups=3),
    lrn("group-below-window", (2, 8, 5, 5), alpha=3.0, groups=4),
    lrn("one-channel", (3, 1, 5, 5), alpha=2.0),
    lrn("size1", (2, 6, 5, 5), alpha=2.0, size=1),
    lrn("size2", (2, 9, 5, 5), alpha=2.0, size=2),
    lrn("size4", (2, 10, 5, 5), alpha=2.0, size=4, groups=2),
    lrn("size-above-channels", (2, 3, 5, 5), alpha=2.0, size=8),
    lrn("size-far-above-channels", (2, 6, 3, 3), alpha=2000.0, size=10_001),
    lrn("size-of-many-channels", (2, 80, 3, 3), alpha=20.0, size=70, groups=2),
    lrn("negative-alpha", (2, 8, 5, 5), alpha=-0.1),
    lrn("beta-half", (2, 8, 5, 5), alpha=2.0, beta=0.5),
    lrn("beta1", (2, 8, 5, 5), alpha=2.0, beta=1.0),
    lrn("beta0", (2, 8, 5, 5), alpha=2.0, beta=0.0),
    lrn("k-tenth", (2, 8, 5, 5), alpha=2.0, k=0.1),
    lrn("no-pooling", (2, 8, 3, 4), alpha=1.0, kernel_size=1, stride=1),
    lrn("pool2", (2, 8, 6, 5), alpha=1.0, kernel_size=2, stride=2),
    lrn("stride1", (2, 8, 5, 5), alpha=1.0, kernel_size=3, stride=1),
    lrn("stride-above-window", (2, 8, 9, 8), alpha=1.0, kernel_size=2, stride=3),
    lrn("ceil", (2, 8, 6, 8), alpha=1.0, ceil_mode=True),
    lrn("no-negatives", (2, 16, 5, 6), alpha=1.0, signed=False),
    lrn("empty", (0, 8, 5, 5)),
]
LRN_LAYOUTS = variants(lrn("layout", (3, 8, 5, 6), alpha=1.0, groups=2), layout=LAYOUTS)
POOL = [
    pool("paper", (3, 10, 7, 9)),
    pool("batch1", (1, 5, 5, 6)),
    pool("batch128", (128, 6, 3, 3)),
    pool("many-channels", (2, 300, 3, 3)),
    pool("one-window", (2, 5, 3, 3)),
    pool("copy", (2, 5, 3, 4), kernel_size=1, stride=1),
    pool("subsample", (2, 5, 7, 6), kernel_size=1, stride=3),
    pool("pool2", (2, 5, 6, 7), kernel_size=2, stride=2),
    pool("stride1", (2, 5, 6, 4), kernel_size=4, stride=1),
    pool("stride-above-window", (2, 5, 9, 8), kernel_size=2, stride=3),
    pool("window15", (1, 3, 17, 16), kernel_size=15, stride=1),
    pool("ceil", (2, 5, 8, 6), ceil_mode=True),
    pool("ceil-no-window-outside", (2, 5, 6, 7), kernel_size=2, stride=3, ceil_mode=True),
    pool("ceil-below-window", (2, 5, 2, 2), kernel_size=3, stride=2, ceil_mode=True),
    pool("empty", (0, 5, 5, 5)),
]
POOL_LAYOUTS = variants(pool("layout", (3, 8, 5, 6)), layout=LAYOUTS)

LINEAR = [
    linear("paper", 5, 19, 23),
    linear("batch1", 1, 40, 17),
    linear("batch16", 16, 64, 32),
    linear("batch128", 128, 33, 20),
    linear("p0.3", 4, 12, 30, p=0.3),
    linear("p0", 4, 12, 30, p=0.0),
    linear("evaluation", 4, 12, 30, training=False),
    linear("without-bias", 4, 12, 30, bias=False),
    linear("without-relu", 4, 12, 30, relu=False),
    linear("bare", 4, 12, 30, relu=False, p=0.0, bias=False),
    linear("offsets", 4, 12, 30, row_offset=1000, feature_offset=2048),
    linear("one-by-one", 1, 1, 1, p=0.0),
    linear("empty", 0, 12, 30),
]
LINEAR_LAYOUTS = variants(
    linear("layout", 6, 14, 9), layout=["reversed", "expanded", "sliced", "unaligned"]
)
LINEAR_FROZEN = variants(linear("frozen", 4, 9, 12), frozen=FROZEN) + variants(
    linear("frozen-no-relu", 4, 9, 12, relu=False), frozen=FROZEN
)

EVERY = [
    *CONV, *CONV_LAYOUTS, *CONV_FROZEN,
    *LRN, *LRN_LAYOUTS, *POOL, *POOL_LAYOUTS,
    *LINEAR, *LINEAR_LAYOUTS, *LINEAR_FROZEN,
]  # fmt: skip
BASIC: list[Case] = [*CONV, *LRN, *POOL, *LINEAR]


def sampled(cases: Iterable[Any], every: int, first: int = 0) -> list[Any]:
    """The cases as parameters of a test; the quick suite takes one of ``every``, from ``first``."""
    return [
        pytest.param(case, id=_name(case), marks=() if i % every == first else pytest.mark.slow)
        for i, case in enumerate(cases)
    ]


def _name(case: Any) -> str:
    return "-".join(map(_name, case)) if isinstance(case, tuple) else str(case)
