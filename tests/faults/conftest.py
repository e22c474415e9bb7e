"""What the fault tests share: forks, and a table of all faults, which is printed at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests._small_train import STEP_SECONDS
from tests.faults._forks import Forks
from tests.faults._table import Table

_TABLE = pytest.StashKey[Table]()


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    with Forks() as made:
        yield made


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes tell each other of a step twice a second or so: what is to be named has to be."""
    monkeypatch.setenv(STEP_SECONDS, "0.05")


@pytest.fixture(scope="session")
def fault_table(request: pytest.FixtureRequest) -> Table:
    return request.config.stash[_TABLE]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLE] = Table()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # in a process of pytest-xdist
        session.config.workeroutput["faults"] = session.config.stash[_TABLE].faults


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[_TABLE].faults += getattr(node, "workeroutput", {}).get("faults", [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in terminalreporter.config.stash[_TABLE].lines():
        terminalreporter.write_line(line)
