"""Parameters that travel together through the functions of an op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Norm(NamedTuple):
    """x * (offset + scale * sum of squares over ``size`` channels) ^ -beta."""

    size: int
    scale: float
    beta: float
    offset: float
    signed: bool = True  # False: no x is negative


def norm_of(numbers: Sequence[float]) -> Norm:
    """The norm of an operator's list of numbers."""
    size, scale, beta, offset, signed = numbers
    return Norm(int(size), scale, beta, offset, bool(signed))


class Window(NamedTuple):
    """Pooling over size x size pixels, every stride pixels."""

    size: int
    stride: int
