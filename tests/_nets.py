"""Nets of the published make with fewer units, for tests that need every kind of layer."""

from __future__ import annotations

from dataclasses import replace

from fastalex.variants import VARIANTS, Variant


def narrow(name: str) -> Variant:
    """A published net with a quarter of the channels, and 64 units in fc6 and in fc7.

    Channels stay multiples of 16, as the kernels for wide loads need.
    """
    variant = VARIANTS[name]
    convolutions = (
        replace(c, channels=16 * max(1, round(c.channels / 64))) for c in variant.convolutions
    )
    fc6, fc7, fc8 = variant.fully_connected
    hidden = (replace(fc6, features=64), replace(fc7, features=64))
    return replace(variant, convolutions=tuple(convolutions), fully_connected=(*hidden, fc8))
