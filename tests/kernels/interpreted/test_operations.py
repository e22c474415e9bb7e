"""Every function, forward and every gradient, on the interpreter's tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .. import _cases as cases
from .._oracle import Case, check
from .._strategies import ANY, SLACK
from ._strict import Strict


def _check(case: Case, dtype: torch.dtype, strict: Strict) -> None:
    check(case, dtype)
    assert strict.launches or "empty" in str(case), "no kernel ran"


@pytest.mark.parametrize("case", cases.sampled(cases.EVERY, 6))
def test_float32(case: Case, strict: Strict) -> None:
    _check(case, torch.float32, strict)


@pytest.mark.parametrize("case", cases.sampled(cases.BASIC, 15, first=3))
def test_float16(case: Case, strict: Strict) -> None:
    _check(case, torch.float16, strict)


@pytest.mark.parametrize("case", cases.sampled(cases.BASIC[::4], 5))
def test_bfloat16(case: Case, strict: Strict) -> None:
    """The interpreter computes in float32 here: its own bfloat16 does not compute."""
    _check(case, torch.bfloat16, strict)


@pytest.mark.slow
@pytest.mark.parametrize("op", ANY)
@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_call(op: str, data: Any) -> None:
    check(data.draw(ANY[op]), torch.float32, slack=SLACK)
