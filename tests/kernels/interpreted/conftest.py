"""Every test of this folder runs its kernels in Triton's interpreter, under strict rules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastalex_kernels import backend
from fastalex_kernels.common.backend import record_launches
from fastalex_kernels.common.launch import interpret

from ._observe import observe
from ._strict import Strict

RealTiles = Callable[[str], contextlib.AbstractContextManager[None]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.interpreted)


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[Strict]:
    """Exact bounds, no races, shuffled programs, and uninitialised memory that holds NaN or 255."""
    monkeypatch.setenv("FASTALEX_GLUON", "never")  # whose kernel _gluon_model.py runs
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # with it torch fills what empty() returns
    assert torch.utils.deterministic.fill_uninitialized_memory
    observer = Strict()
    try:
        with backend("interpreter"), observe(observer):
            yield observer
    finally:
        torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def real_tiles() -> RealTiles:
    """``with real_tiles("sm_90"):`` interprets with that target's tiles, splits and all.

    The interpreter has tiles of its own, so large that a small tensor is a single program.
    """
    return lambda target: record_launches(target, interpret)
