"""Starts the child processes of this suite, and keeps their tests out of this one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fastalex_kernels.common.launch import interpreted

from ._suites import Children, Suite

_children = Children()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.name == "sanitized":
        return None if "ttsem" in sys.modules else True
    if collection_path.name != "interpreted" or interpreted():
        return None
    if any("interpreted" in argument for argument in config.args):
        raise pytest.UsageError("tests/kernels/interpreted needs TRITON_INTERPRET=1, set it")
    return True


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly or "PYTEST_XDIST_WORKER" in os.environ:
        return
    parameters = [getattr(item, "callspec", None) for item in session.items]
    suites = [p.params["suite"] for p in parameters if p is not None and "suite" in p.params]
    _children.start(s for s in suites if isinstance(s, Suite) and not s.obstacle())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for name, line in _children.summaries().items():
        terminalreporter.write_line(f"tests/kernels {name}: {line.strip('= ')}")


def pytest_unconfigure() -> None:
    _children.stop()


@pytest.fixture(scope="session")
def children() -> Children:
    return _children
