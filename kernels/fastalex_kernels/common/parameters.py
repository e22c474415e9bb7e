"""Parameters that travel together through the functions of an op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Norm(NamedTuple):
    """x * (offset + scale * sum of squares over ``size`` channels) ^ -beta."""

    size: int
    scale: float
    beta: float
    offset: float
    signed: bool = True  # False: no x is negative


class Window(NamedTuple):
    """Pooling over size x size pixels, every stride pixels."""

    size: int
    stride: int


class Pooling(NamedTuple):
    """Max-pooling, after response normalisation unless ``norm`` is None."""

    norm: Norm | None
    groups: int  # of channels; no window of channels crosses a border between them
    window: Window  # of pixels


def norm_of(numbers: Sequence[float]) -> Norm:
    """The norm of an operator's list of numbers."""
    size, scale, beta, offset, signed = numbers
    return Norm(int(size), scale, beta, offset, bool(signed))


class Dropout(NamedTuple):
    """What is dropped of rows of features, and how what is kept is scaled."""

    p: float = 0.0  # probability that an element is dropped; results are divided by 1 - p
    rng: torch.Tensor | None = None  # int64 (seed, offset); None drops nothing
    row_offset: int = 0  # where the block lies in the whole batch
    feature_offset: int = 0  # and in the whole layer


NO_DROPOUT = Dropout()
