"""The tests of a GPU that ttsem has time for: real tiles, bfloat16, TF32, races, poison."""

from __future__ import annotations

from tests.kernels.test_gpu import (
    test_augment,
    test_bfloat16,
    test_cross_entropy,
    test_dropout_as_on_a_cpu,
    test_fused_update,
    test_masked_gradients,
    test_same_bits_again,
    test_tf32,
)

__all__ = [
    "test_augment",
    "test_bfloat16",
    "test_cross_entropy",
    "test_dropout_as_on_a_cpu",
    "test_fused_update",
    "test_masked_gradients",
    "test_same_bits_again",
    "test_tf32",
]
