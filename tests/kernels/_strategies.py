"""Random calls for hypothesis: any legal shapes, strides, paddings, groups and layouts, small."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from fastalex_kernels.lrn_pool.function import pooled_size

from ._cases import LAYOUTS
from ._oracle import Case, conv, linear, lrn, pool

# A few made-up terms may cancel in a sum, whose rounding is relative to the terms.
SLACK = 10.0

_layouts = st.sampled_from(["contiguous", *LAYOUTS])
_seeds = st.integers(0, 2**16)


@st.composite
def convolutions(draw: Any) -> Case:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    sides = tuple(draw(st.tuples(st.integers(0, 4), st.integers(0, 4))) for _ in range(2))
    image = tuple(
        draw(st.integers(max(1, k - sum(s)), 9)) for k, s in zip(kernel, sides, strict=True)
    )
    return conv(
        "any",
        (draw(st.integers(0, 4)), groups * draw(st.integers(1, 6)), *image),
        groups * draw(st.integers(1, 6)),
        kernel,
        stride=draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        padding=sides,
        groups=groups,
        relu=draw(st.booleans()),
        bias=draw(st.booleans()),
        layout=draw(_layouts),
        seed=draw(_seeds),
    )


@st.composite
def _pooling(draw: Any) -> tuple[tuple[int, int], dict[str, Any]]:
    window = draw(st.integers(1, 5))
    arguments = {
        "kernel_size": window,
        "stride": draw(st.integers(1, 5)),
        "ceil_mode": draw(st.booleans()),
    }
    sizes = [n for n in range(1, 10) if pooled_size(n, *arguments.values()) > 0]
    return (draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes))), arguments


@st.composite
def normalisations(draw: Any) -> Case:
    image, arguments = draw(_pooling())
    groups = draw(st.integers(1, 4))
    shape = (draw(st.integers(0, 4)), groups * draw(st.integers(1, 9)), *image)
    # With a large alpha the two terms of a gradient may cancel: not of many elements at once.
    alphas = [1e-4, 0.1, 3.0] if math.prod(shape) >= 64 else [1e-4, 0.1]
    return lrn(
        "any",
        shape,
        draw(_layouts),
        size=draw(st.integers(1, 7)),
        alpha=draw(st.sampled_from(alphas)),
        beta=draw(st.sampled_from([0.75, 0.75, 0.5, 1.0])),
        k=draw(st.sampled_from([0.5, 1.0, 2.0])),
        groups=groups,
        **arguments,
    )


@st.composite
def poolings(draw: Any) -> Case:
    image, arguments = draw(_pooling())
    shape = (draw(st.integers(0, 4)), draw(st.integers(1, 9)), *image)
    return pool("any", shape, draw(_layouts), **arguments)


@st.composite
def linears(draw: Any) -> Case:
    return linear(
        "any",
        draw(st.integers(0, 9)),
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
        p=draw(st.sampled_from([0.0, 0.3, 0.5, 0.9])),
        relu=draw(st.booleans()),
        training=draw(st.booleans()),
        row_offset=draw(st.integers(0, 2**30)),
        feature_offset=draw(st.integers(0, 2**30)),
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "reversed", "sliced", "expanded"])),
        seed=draw(_seeds),
    )


ANY = {"conv2d": convolutions(), "lrn": normalisations(), "pool": poolings(), "linear": linears()}
