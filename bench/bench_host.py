"""What the host spends on a training step, measured where there is no GPU.

The kernels are compiled for an H100, and Triton's own launcher launches them into a CUDA driver
whose functions do nothing. A step is whole: counters of dropout, rates, what may have changed since
the last step, inputs, every launch, the loss. Of torch's few copies the call is counted, and not
the copying, which is a CPU's own; of exchanges between towers nothing is.

Beside it stand the same launches as ``kernel[grid](...)``. Times are CPU time of this thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.driver import driver

from fastalex import AlexNet
from fastalex.distributed.towers import cut_to_tower
from fastalex.training import TrainStep
from fastalex.training.optim import build_optimizer, set_learning_rate
from fastalex.tuning.train_steps import Training
from fastalex_kernels.common.backend import record_launches
from fastalex_kernels.common.program import Launch

from ._libcuda import StubDriver
from ._report import Report
from ._timing import take_turns

pytestmark = [
    pytest.mark.benchmark(timer=time.thread_time),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="a GPU is here: bench_step.py measures the host, too"
    ),
]

BATCH, ROUNDS = 128, 300
# Low estimates, not measured, for an H100 in bf16: python -m fastalex.roofline [--gpus 2].
GPU_SECONDS = {"one GPU": 1515e-6, "tower": 962e-6}


class _NoExchange:
    """Of a tower whose exchanges cost nothing."""

    rank = 0

    def transfer(self, sent: torch.Tensor) -> _NoTransfer:
        return _NoTransfer(torch.empty_like(sent))


@dataclass
class _NoTransfer:
    received: torch.Tensor

    def start(self) -> None:
        pass

    def wait(self) -> None:
        pass


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StubDriver]:
    folder: Path = tmp_path_factory.mktemp("driver")
    previous = driver._active
    try:
        stub = StubDriver(folder)
    except RuntimeError as error:
        pytest.skip(str(error))
    with record_launches("sm_90", lambda kernel, grid, args, kwargs: kernel[grid](*args, **kwargs)):
        yield stub
    driver.set_active(previous)


@pytest.mark.parametrize("what", list(GPU_SECONDS))
def test_host(benchmark: Any, report: Report, sizes: Any, stub: StubDriver, what: str) -> None:
    batch, rounds = sizes(BATCH, ROUNDS)
    model = AlexNet()  # its weights change nothing
    if what == "tower":
        cut_to_tower(model, _NoExchange())
    optimizer = build_optimizer(model, lr=0.01)
    training = Training(torch.device("cpu"), "bf16", batch)
    step = TrainStep(model, optimizer, "bf16", augment=training.augment())
    pixels, labels = training.bytes()
    number = 0

    def ours() -> None:
        nonlocal number
        number += 1
        set_learning_rate(optimizer, 0.01)
        model.seed_dropout(0, number)
        step(pixels, labels)

    ours()
    launches = [launch for launch in step.launches if launch.grid is not None]
    for launch in step.launches:
        if launch.grid is None:
            _shrink(launch)
    before = stub.launched
    ours()
    launched, early = (b - a for a, b in zip(before, stub.launched, strict=True))
    assert (launched, early) == (len(launches), sum(x.starts_early for x in launches))

    def theirs() -> None:
        for launch in launches:
            launch.kernel[launch.grid](*launch.arguments, **launch.options)

    times = take_turns(benchmark, ours, theirs, rounds, time.thread_time)
    report.add(
        benchmark, "host", times, batch, layer=what, direction="host",
        against="launches", batch=batch, dtype="bf16", launches=len(launches),
        **{"estimated GPU ms": GPU_SECONDS[what] * 1e3},
    )  # fmt: skip


def _shrink(call: Launch) -> None:
    """Let a call of torch's see one element along every axis but the last."""
    call.arguments[:] = [_corner(x) for x in call.arguments]
    call.options = {name: _corner(x) for name, x in call.options.items()}
    owner = getattr(call.kernel, "__self__", None)
    if isinstance(owner, torch.Tensor):
        call.kernel = getattr(_corner(owner), call.kernel.__name__)


def _corner(x: Any) -> Any:
    if isinstance(x, list):
        return [_corner(part) for part in x]
    if not isinstance(x, torch.Tensor):
        return x
    return x[(slice(1),) * (x.dim() - 1)]
