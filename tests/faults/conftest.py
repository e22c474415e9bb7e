"""What the fault tests share: forks, and steps that take a while."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests._small_train import STEP_SECONDS
from tests.faults._forks import Forks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    with Forks() as made:
        yield made


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes tell each other of a step twice a second or so: what is to be named has to be."""
    monkeypatch.setenv(STEP_SECONDS, "0.05")
