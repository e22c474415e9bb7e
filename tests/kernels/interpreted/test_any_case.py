"""Calls that hypothesis makes up, a few of each."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings

from .. import _strategies as any_of
from .._oracle import Case, check

few = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(any_of.convolutions())
def test_conv2d_relu(case: Case) -> None:
    check(case, torch.float32, slack=any_of.SLACK)


@few
@given(any_of.normalisations())
def test_lrn_max_pool2d(case: Case) -> None:
    check(case, torch.float32, slack=any_of.SLACK)


@few
@given(any_of.poolings())
def test_max_pool2d(case: Case) -> None:
    check(case, torch.float32, slack=any_of.SLACK)


@few
@given(any_of.linears())
def test_linear_relu_dropout(case: Case) -> None:
    check(case, torch.float32, slack=any_of.SLACK)
