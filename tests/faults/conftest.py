"""What the fault tests share: forks, and a table of all faults, which is printed at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests._small_train import STEP_SECONDS
from tests.faults._forks import Forks
from tests.faults._table import Table


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    with Forks() as made:
        yield made


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes tell each other of a step twice a second or so: what is to be named has to be."""
    monkeypatch.setenv(STEP_SECONDS, "0.05")


@pytest.fixture(scope="session")
def fault_table(request: pytest.FixtureRequest) -> Iterator[Table]:
    table = Table()
    yield table
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("", *table.lines(), sep="\n")
