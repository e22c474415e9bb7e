"""The tests of a GPU that ttsem has time for: real tiles, bfloat16, TF32, races, poison."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from fastalex_kernels.common.layout import as_hwnc
from fastalex_kernels.conv2d.columns import pixels_as_columns
from fastalex_kernels.conv2d.forward import pack_weight
from tests.kernels._oracle import Case, check, conv, make_inputs
from tests.kernels.test_gpu import (
    test_augment,
    test_bfloat16,
    test_cross_entropy,
    test_dropout_as_on_a_cpu,
    test_fused_update,
    test_masked_gradients,
    test_one_pass,
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
    "test_one_pass",
    "test_same_bits_again",
    "test_tf32",
]

# 64 channels make 128 columns of two pixels; 96 make 192, 64 of them in a tail.
COLUMNS = [
    conv("columns", (128, 64, 2, 3), 64, 3, padding=1),
    conv("columns-tail", (128, 192, 2, 3), 128, 2, padding=((1, 0), (0, 1)), groups=2),
]


@pytest.fixture
def blocks_of_two_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton folds a reshape from [1, m, n] into the load; ttsem 0.1.0 leaves out the reshape."""
    handlers = importlib.import_module("ttsem.ops").OPS
    load = handlers["tt.descriptor_load"]

    def reshaped(*args: Any) -> list[Any]:
        return [block.reshape(block.shape[-2:]) for block in load(*args)]

    monkeypatch.setitem(handlers, "tt.descriptor_load", reshaped)


@pytest.mark.usefixtures("blocks_of_two_axes")
@pytest.mark.parametrize("case", COLUMNS, ids=str)
def test_an_input_gradient_in_columns(case: Case) -> None:
    """It needs 128 images, which no step here has."""
    x, w, *_ = make_inputs(case, torch.bfloat16, "cuda")
    groups = case.arguments.get("groups", 1)
    dz = as_hwnc(x.new_empty((128, w.shape[0], 2, 3)))
    assert pixels_as_columns(dz, pack_weight(w.detach()), groups) == 2
    check(case, torch.bfloat16, "cuda")
