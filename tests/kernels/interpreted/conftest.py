"""Every test of this folder runs its kernels in the interpreter, under strict rules."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from fastalex_kernels.common.launch import record_launches

from ._observe import observe
from ._strict import Strict

RealTiles = Callable[[str], contextlib.AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def strict() -> Iterator[Strict]:
    """Exact bounds, no races, shuffled programs, and uninitialised memory that holds NaN or 255."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # with it torch fills what empty() returns
    assert torch.utils.deterministic.fill_uninitialized_memory
    observer = Strict()
    try:
        with observe(observer):
            yield observer
    finally:
        torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def real_tiles(monkeypatch: pytest.MonkeyPatch) -> RealTiles:
    """``with real_tiles("sm_90"):`` interprets with that target's tiles, splits and all.

    The interpreter has tiles of its own, so large that a small tensor is a single program.
    """

    @contextlib.contextmanager
    def as_on(target: str) -> Iterator[None]:
        with monkeypatch.context() as patch:
            for name, module in list(sys.modules.items()):
                if name.startswith("fastalex_kernels.") and hasattr(module, "interpreted"):
                    patch.setattr(module, "interpreted", lambda: False)
            with record_launches(target, lambda kernel, grid, args, kw: kernel[grid](*args, **kw)):
                yield

    return as_on
