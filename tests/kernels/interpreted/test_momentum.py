"""Gradients applied where they are made: the kernels, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from .. import _updates as updates
from .._cases import sampled
from .._oracle import Case, conv, linear
from .conftest import RealTiles

PACKED = [c for c in updates.CASES if c.op == "conv2d_relu" and "stride" not in c.arguments]
TILES = [
    conv("whole-tiles", (128, 32, 3, 2), 128, 2),
    conv("stride", (17, 3, 23, 19), 40, 5, stride=2),
    linear("tiles", 130, 136, 200, p=0.3),
    linear("columns-1000", 17, 64, 1000, p=0.0),
]


@pytest.mark.parametrize("rule", updates.RULES)
@pytest.mark.parametrize("case", sampled(updates.CASES, 4))
def test_float32(case: Case, rule: str) -> None:
    updates.check(case, torch.float32, rule)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_weight_in_the_order_its_kernels_read(case: Case, dtype: torch.dtype) -> None:
    updates.check(case, dtype, "paper", packed=True)


@pytest.mark.parametrize("case", sampled(updates.CASES, 7, first=1))
def test_float16(case: Case) -> None:
    updates.check(case, torch.float16, "torch")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
@pytest.mark.parametrize("case", TILES, ids=str)
def test_real_tiles(case: Case, target: str, real_tiles: RealTiles) -> None:
    with real_tiles(target):
        updates.check(case, torch.float16, "paper")
