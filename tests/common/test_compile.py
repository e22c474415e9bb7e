"""The pool of processes that compiles kernels ahead."""

from __future__ import annotations

import os

import pytest

from fastalex.common import interrupts
from fastalex.common.compile import compile_ahead


@pytest.mark.timeout(60)
def test_the_pool_ends_where_a_run_takes_note_of_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes inherit the run's handlers, and SIGTERM is how a pool ends them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    judge = lambda launch, target: "bad" if launch == 3 else None  # noqa: E731
    with interrupts.noticed():
        for _ in range(3):
            jobs = compile_ahead([[i] for i in range(40)], "sm_90", judge)  # type: ignore[list-item]
            assert [next(jobs).failure for _ in range(4)] == [None, None, None, "bad"]
            jobs.close()  # type: ignore[attr-defined]
