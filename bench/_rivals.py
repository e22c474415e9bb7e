"""What our nets and layers are timed against: the values of a benchmark's ``against``."""

from __future__ import annotations

import pytest
import torch

# Stock torch, eager; our functions on cuDNN and cuBLAS; stock torch under torch.compile.
RIVALS = [
    "stock",
    pytest.param(
        "aten",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="is ours on a CPU"),
    ),
    pytest.param("compiled", marks=pytest.mark.compiled),
]
