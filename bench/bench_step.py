"""A whole training step of AlexNet, against torch's and against itself without one of its tricks.

What every row is, is said in bench/README.md; the steps themselves are fastalex.tuning.train_steps.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastalex.inspection.cost import Floor
from fastalex.model.alexnet import ReferenceAlexNet
from fastalex.tuning.train_steps import (
    Step,
    Training,
    autograd_step,
    check_steps,
    stock_step,
    train_step,
)

from ._report import Report
from ._timing import clock, take_turns

pytestmark = pytest.mark.benchmark(timer=clock)

BATCH = {"cpu": 32, "cuda": 128}
ROUNDS = {"cpu": 7, "cuda": 50}
CHECKED = {"cpu": 2, "cuda": 6}  # steps: on a GPU the last ones replay a graph

SHARED = "stock, shared"  # the last row: this process stays behind its neighbour from there on

# By what stands under "against"; the most telling first, should the time of a GPU run out.
ONE_GPU: dict[str, Callable[[Training], Step]] = {
    "stock": stock_step,
    "no graph": functools.partial(train_step, graph=False),
    "stock, graph": functools.partial(stock_step, graph=True),
    "compiled": functools.partial(stock_step, compiled=True),
    "compiled, graph": functools.partial(stock_step, compiled=True, graph=True),
    "autograd": autograd_step,
    "no fused update": functools.partial(train_step, fused_update=False),
    "no fused activation": functools.partial(train_step, fused_activation=False),
    "no dependent launch": functools.partial(train_step, dependent_launch=False),
    SHARED: stock_step,
}
TOWER: dict[str, Callable[[Training], Step]] = {
    "one GPU": train_step,
    "no graph": functools.partial(train_step, towers=2, graph=False),
    "no early": functools.partial(train_step, towers=2, early=False),
    "no fused update": functools.partial(train_step, towers=2, fused_update=False),
    "no fused activation": functools.partial(train_step, towers=2, fused_activation=False),
}
ON_A_CPU = ("stock", "compiled", "autograd", "no fused update", SHARED)


def _rows() -> list[Any]:
    gpu = torch.cuda.is_available()
    rows = []
    for what, rivals in (("step", ONE_GPU), ("tower", TOWER)):
        for against in rivals:
            marks: list[Any] = []
            if gpu and against == SHARED:
                marks = [pytest.mark.skip(reason="the CPU's cores are what is shared")]
            elif not gpu and (what == "tower" or against not in ON_A_CPU):
                marks = [pytest.mark.skip(reason="needs a GPU, for its graph or our kernels")]
            elif against.startswith("compiled"):
                marks = [pytest.mark.compiled]
            rows.append(pytest.param(what, against, marks=marks))
    return rows


@pytest.fixture(scope="module")
def training(device: str, sizes: Callable[[int, int], tuple[int, int]]) -> Training:
    precision = "bf16" if device == "cuda" else "float32"
    return Training(torch.device(device), precision, sizes(BATCH[device], 0)[0])


@pytest.fixture(scope="module")
def error(training: Training, device: str) -> float:
    """Of the first losses, against stock layers in float64: nothing wrong is timed."""
    return check_steps(training, train_step, CHECKED[device])


@pytest.fixture(scope="module")
def ours(training: Training, error: float) -> Callable[[str], Step]:
    """Our step of one GPU or of a tower, the same for every row."""
    return functools.cache(lambda what: train_step(training, 2 if what == "tower" else 1))


@pytest.fixture(scope="module")
def work(training: Training) -> Callable[[str], Floor]:
    return functools.cache(lambda what: work_of_step(training, 2 if what == "tower" else 1))


@pytest.mark.parametrize(("what", "against"), _rows())
def test_step(
    benchmark: Any,
    report: Report,
    device: str,
    sizes: Callable[[int, int], tuple[int, int]],
    training: Training,
    error: float,
    ours: Callable[[str], Step],
    work: Callable[[str], Floor],
    what: str,
    against: str,
) -> None:
    theirs = (ONE_GPU if what == "step" else TOWER)[against](training)
    rounds = sizes(0, ROUNDS[device])[1]
    with busy_neighbour() if against == SHARED else contextlib.nullcontext():
        times = take_turns(benchmark, ours(what), theirs, rounds)
    report.add(
        benchmark, "step", times, work(what), layer=what, direction="training", against=against,
        batch=training.batch, dtype=training.precision, error=error,
    )  # fmt: skip


@contextlib.contextmanager
def busy_neighbour() -> Iterator[None]:
    """Another process keeps one core busy, and this one is as under ``nice -n 10``."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
        try:
            for thread in os.listdir("/proc/self/task"):
                os.setpriority(os.PRIO_PROCESS, int(thread), 10)
            yield
        finally:
            neighbour.kill()


def work_of_step(training: Training, towers: int) -> Floor:
    """The products of a step, and what its updates read and write: 18 bytes a parameter in bf16."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = ReferenceAlexNet(variant=training.variant)
        model(torch.empty(training.batch, 3, 224, 224)).sum().backward()
    copied = 2 if training.precision == "bf16" else 0
    size = (4 * 4 + copied) * sum(p.numel() for p in model.parameters())
    return Floor(counter.get_total_flops() / towers, size / towers)
