"""The kernels of a run, known and compiled before its first step."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import triton

from fastalex.common import compile as pool
from fastalex.data import Normalization
from fastalex.inspection.record import record_step
from fastalex.training import precompile
from fastalex.training.precompile import Work
from fastalex_kernels.common.backend import interpreted

pytestmark = pytest.mark.skipif(interpreted(), reason="an interpreted kernel is never compiled")

SCALE = Normalization((0.0,) * 3, (1.0,) * 3)
WORK = Work("paper", 1000, 224, [128], [128, 80], "bf16", "torch", True, 1, SCALE, "crop", 0.5)


@pytest.mark.parametrize("towers", [1, 2])
def test_every_launch_of_a_step_is_known_before(towers: int) -> None:
    known = precompile.unique(precompile.launches_of(WORK._replace(towers=towers), "sm_90"))
    events = record_step("sm_90", 128, towers=towers).events
    needed = precompile.unique(e.launch for e in events if e.launch is not None)
    assert len(needed) > 20
    named = {precompile._specialisation(launch) for launch in known}
    assert {precompile._specialisation(launch) for launch in needed} <= named
    # A validation's last batch of another size launches others.
    alone = WORK._replace(towers=towers, val_batches=[])
    assert len(precompile.unique(precompile.launches_of(alone, "sm_90"))) < len(known)


@pytest.mark.slow
@pytest.mark.compiled
def test_what_counts_as_one_kernel_is_one_to_triton() -> None:
    """fc8 and the loss: as many compiled kernels as specialisations, and no fewer."""
    launches = [
        x for x in precompile.launches_of(WORK, "sm_80") if x.layer in ("fc8", "loss", "step")
    ]
    apart = precompile.unique(launches)
    compiled = {id(pool.compile_launch(launch, "sm_80")) for launch in launches}
    assert len(compiled) == len(apart) < len(launches)


def test_a_machine_compiles_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    compiled: list[int] = []

    def compile_ahead(jobs: Sequence[Any], target: str) -> Iterator[pool.Compiled]:
        compiled.append(len(jobs))
        return iter([pool.Compiled(None, 0.1)] * len(jobs))

    monkeypatch.setattr(precompile, "compile_ahead", compile_ahead)
    monkeypatch.setattr(precompile, "launches_of", lambda work, target: [])
    monkeypatch.setattr(precompile, "unique", lambda launches: [object()] * 7)
    said: list[str] = []

    def rank() -> None:
        precompile.compile_first(WORK, "sm_90", "NVIDIA H100", said.append)

    ranks = [threading.Thread(target=rank) for _ in range(2)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join()
    rank()
    assert (compiled, said) == ([7], ["compiling 7 kernels, once on this machine"])
    precompile.compile_first(WORK._replace(image_size=64), "sm_90", "NVIDIA H100", said.append)
    assert compiled == [7, 7]
    precompile.compile_first(WORK, "gfx90a", "MI250", said.append)  # for which nothing stands in
    assert compiled == [7, 7]
    assert said[-1] == "compiling kernels during the first steps, once on this machine"
