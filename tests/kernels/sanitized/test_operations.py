"""The tests of a GPU that ttsem has time for: real tiles, bfloat16, TF32, races, poison."""

from __future__ import annotations

import pytest
import torch

from fastalex_kernels.common.tuned import Key, Tile, choosing
from tests.kernels._oracle import Case, check, conv
from tests.kernels.test_gpu import (
    test_augment,
    test_bfloat16,
    test_cross_entropy,
    test_dropout_as_on_a_cpu,
    test_fused_update,
    test_half_of_the_columns_after_the_other,
    test_halves,
    test_masked_gradients,
    test_one_pass,
    test_rounding,
    test_same_bits_again,
    test_tf32,
)

__all__ = [
    "test_augment",
    "test_bfloat16",
    "test_cross_entropy",
    "test_dropout_as_on_a_cpu",
    "test_fused_update",
    "test_half_of_the_columns_after_the_other",
    "test_halves",
    "test_masked_gradients",
    "test_one_pass",
    "test_rounding",
    "test_same_bits_again",
    "test_tf32",
]

# Pixels that share blocks of the weight, and runs of them that share x.
SHARING = [
    conv("runs", (128, 64, 2, 3), 64, 3, padding=1),
    conv("tail", (128, 32, 2, 3), 192, 2, padding=((1, 0), (0, 1))),
]


# The taps of a line as columns of one product; the weight gradient needs 64 images for them.
LINES = [conv("lines", (64, 48, 3, 3), 16, (3, 5), padding=((1, 0), (2, 1)), groups=2)]


@pytest.mark.parametrize("case", LINES, ids=str)
def test_taps_of_a_line(case: Case) -> None:
    check(case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("case", SHARING, ids=str)
def test_pixels_that_share(case: Case) -> None:
    """It needs 128 images, which no step here has."""
    taken = []

    def widen(key: Key, own: Tile) -> Tile:
        taken.append(key[0])
        return (256, 128, *own[2:]) if key[0] in ("conv2d forward", "conv2d input") else own

    with choosing(widen):
        check(case, torch.bfloat16, "cuda")
    assert {"conv2d forward", "conv2d input"} <= set(taken)
