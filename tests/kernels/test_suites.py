"""Waits for what runs in child processes: the interpreter and ttsem."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import report
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


def test_the_report_keeps_ttsem_out_of_triton_s_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """``fastalex.roofline`` would find what ttsem leaves there, and cannot read it."""
    given = []

    def errors(command: list[str], **environment: str) -> dict[str, dict[str, float]]:
        given.append((command[2], environment.get("TRITON_CACHE_DIR")))
        return {}

    monkeypatch.setattr(report, "_errors", errors)
    monkeypatch.setattr(report, "missing_ttsem", str)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    report.error_table()
    assert given == [("float32", None), ("ttsem.sanitize", str(tmp_path / "cache-ttsem"))]
