"""Every function, forward and every gradient, on the interpreter's tiles."""

from __future__ import annotations

import pytest
import torch

from .. import _cases as cases
from .._oracle import Case, check
from ._strict import Strict


def _check(case: Case, dtype: torch.dtype, strict: Strict) -> None:
    check(case, dtype)
    assert strict.launches or "empty" in str(case), "no kernel ran"


@pytest.mark.parametrize("case", cases.EVERY, ids=str)
def test_float32(case: Case, strict: Strict) -> None:
    _check(case, torch.float32, strict)


@pytest.mark.parametrize("case", cases.BASIC, ids=str)
def test_float16(case: Case, strict: Strict) -> None:
    _check(case, torch.float16, strict)


@pytest.mark.parametrize("case", cases.BASIC[::4], ids=str)
def test_bfloat16(case: Case, strict: Strict) -> None:
    """The interpreter computes in float32 here: its own bfloat16 does not compute."""
    _check(case, torch.bfloat16, strict)
