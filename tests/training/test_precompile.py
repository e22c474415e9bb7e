"""The kernels of a run, known and compiled before its first step."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from fastalex import AlexNet
from fastalex.common import compile as pool
from fastalex.data import Normalization
from fastalex.data.augment import Augment
from fastalex.distributed.exchange import LoopbackExchange
from fastalex.distributed.towers import cut_to_tower
from fastalex.inspection.record import record_step
from fastalex.training import TrainStep, precompile
from fastalex.training.optim import BUFFERS, build_optimizer
from fastalex_kernels.common.backend import interpreted
from fastalex_kernels.common.tuned import Key, Tile

pytestmark = pytest.mark.skipif(interpreted(), reason="an interpreted kernel is never compiled")

CPU = torch.device("cpu")
RUN = ("crop", [128, 80], "sm_90", "NVIDIA H100")


def a_step(towers: int = 1, momentum_dtype: str = "float32") -> TrainStep:
    model = AlexNet()
    if towers > 1:
        cut_to_tower(model, LoopbackExchange())
    augment = Augment(Normalization((0.0,) * 3, (1.0,) * 3), 224, CPU)
    rule, dtype = ("torch", "paper")[momentum_dtype == "bf16"], BUFFERS[momentum_dtype]
    optimizer = build_optimizer(model, 0.01, rule=rule, momentum_dtype=dtype)
    return TrainStep(model, optimizer, "bf16", augment=augment)


@pytest.mark.parametrize(("towers", "momentum"), [(1, "float32"), (2, "float32"), (1, "bf16")])
def test_every_launch_of_a_step_is_known_before(towers: int, momentum: str) -> None:
    step = a_step(towers, momentum)
    known = precompile.unique(precompile.launches_of(step, *RUN))
    events = record_step("sm_90", 128, towers=towers, momentum_dtype=momentum).events
    needed = precompile.unique(e.launch for e in events if e.launch is not None)
    assert len(needed) > 20
    named = set(map(precompile.specialisation, known))
    assert set(map(precompile.specialisation, needed)) <= named
    # A validation's last batch of another size launches others.
    alone = precompile.launches_of(step, "crop", [128], *RUN[2:])
    assert len(precompile.unique(alone)) < len(known)


def test_tiles_that_were_tuned_here_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles: dict[Key, Tile] = {("linear backward", "bfloat16", (128, 4096, 9216)): (128, 32, 8, 2)}
    monkeypatch.setattr(precompile, "read_table", lambda path, device: tiles)
    blocks = [
        launch.named["BLOCK_N"]
        for launch in precompile.launches_of(a_step(), *RUN)
        if launch.name.endswith("_linear_bwd_kernel")
    ]
    assert len(blocks) == 3
    assert blocks.count(128) == 1


@pytest.mark.slow
@pytest.mark.compiled
def test_what_counts_as_one_kernel_is_one_to_triton() -> None:
    """Of products and the loss: as many compiled kernels as specialisations, and no fewer."""
    every = precompile.launches_of(a_step(), "crop", [128, 80], "sm_80", "")
    launches = [x for x in every if "linear" in x.name or "cross_entropy" in x.name]
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
    monkeypatch.setattr(precompile, "launches_of", lambda step, augmentation, counts, *_: counts)
    monkeypatch.setattr(precompile, "specialisation", str)
    said: list[str] = []
    step = a_step()

    def rank(*counts: int, gpu: str = "sm_90") -> None:
        monkeypatch.setattr(precompile, "target_of", lambda device: gpu)
        precompile.compile_first(step, "crop", counts or (1, 2, 3), said.append)

    ranks = [threading.Thread(target=rank) for _ in range(2)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join()
    rank()
    assert (compiled, said) == ([3], ["compiling 3 kernels, once on this machine"])
    rank(4, 5)
    assert compiled == [3, 2]
    rank(6, gpu="gfx90a")  # for which nothing stands in
    assert compiled == [3, 2]
    assert said[-1] == "compiling kernels during the first steps, once on this machine"
