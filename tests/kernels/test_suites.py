"""Waits for what runs in child processes: the interpreter and ttsem."""

from __future__ import annotations

import pytest

from ._suites import Children, Suite, interpreted_suites, sanitized_suites


@pytest.mark.timeout(1800)  # a child may wait for its turn
@pytest.mark.parametrize(
    "suite", [*interpreted_suites(), *sanitized_suites()], ids=lambda s: s.name
)
def test_suite(suite: Suite, children: Children) -> None:
    if suite.obstacle():
        pytest.skip(suite.obstacle())
    status, output = children.result(suite)
    assert status == 0, f"{suite.name} ended with {status}:\n" + output[-20_000:]
    assert " passed" in output
    assert "too large to be checked for races" not in output
