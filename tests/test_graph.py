"""A step as one graph: what a capture needs, as far as it can be seen without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastalex.fused_update import fuse_updates, lay_out
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastalex_kernels as kernels
from fastalex import AlexNet, train
from fastalex.checkpoint import load_weights
from fastalex.data.augment import Augment
from fastalex.data.normalization import Normalization
from fastalex.graph import WARM_UP, Graphed
from fastalex.optim import build_optimizer, set_learning_rate
from fastalex.recorded_step import tensor_of
from fastalex_kernels._launch import interpreted, record_launches

CPU = torch.device("cpu")


class Captured:
    """Stands for CUDA graphs: keeps the call, and runs it again on the tensors it was made of."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, call: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        self.captures += 1
        output = torch.full((), float("nan"))  # nothing runs while a graph is captured

        def replay() -> None:
            output.copy_(call())

        return replay, output


def test_every_call_does_its_work_once_and_keeps_its_result() -> None:
    total = torch.zeros(())

    def compute(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total.add_((x * y).sum())
        return (x + y).sum()

    capture = Captured()
    graphed = Graphed(compute, CPU, capture=capture)
    inputs = [(torch.full((3,), float(i)), torch.full((3,), 2.0)) for i in range(WARM_UP + 4)]
    results = [graphed(*pair) for pair in inputs]
    assert capture.captures == 1
    assert [float(r) for r in results] == [3.0 * i + 6 for i in range(WARM_UP + 4)]
    assert float(total) == sum(6.0 * i for i in range(WARM_UP + 4))
    for i, (x, _) in enumerate(inputs):
        assert torch.equal(x, torch.full((3,), float(i))), "an input was kept and written"


class _Step:
    """Forward, loss and backward as the engine computes them, and what comes before."""

    def __init__(self, fused: bool) -> None:
        self.model = AlexNet(5)
        self.one = torch.ones(())
        if fused:
            lay_out(self.model)
        self.optimizer = build_optimizer(self.model, 0.01, rule="paper")
        if fused:
            fuse_updates(self.model, self.optimizer, torch.bfloat16)
        normal = Normalization((120.0, 115.0, 100.0), (1.0, 1.0, 1.0))
        self.augment = Augment(normal, 64, CPU, colored=True)

    def prepare(self, step: int) -> None:
        set_learning_rate(self.optimizer, 0.01 / step)
        self.model.seed_dropout(step, step)

    def compute(self, labels: torch.Tensor, *pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(self.augment.for_layer(self.model.features[0], *pixels))
        loss = kernels.cross_entropy(logits, labels, gradient=self.one)
        self.optimizer.zero_grad()
        loss.backward(self.one)
        return loss.detach()


def _batch() -> list[torch.Tensor]:
    offsets = torch.zeros(4, dtype=torch.int32)
    images = torch.zeros(4, 73, 73, 3, dtype=torch.uint8)
    mirrors, colors = torch.zeros(4, dtype=torch.bool), torch.zeros(4, 3)
    return [torch.zeros(4, dtype=torch.int64), images, offsets, offsets, mirrors, colors]


def _held(step: _Step) -> list[torch.Tensor]:
    """Every tensor that a step changes and the next one reads."""
    found = [*step.model.parameters()]
    for state in step.optimizer.state.values():
        found += [v for v in state.values() if isinstance(v, torch.Tensor)]
    for layer in step.model.modules():
        if isinstance(getattr(layer, "rng", None), torch.Tensor):
            found.append(layer.rng)
        for update in getattr(layer, "update", None) or ():
            found += [update.rate, update.operand, update.squares]
    return found


class _NoHost(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails where a value is read on the host, or a tensor is made of the host's values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        assert name not in ("_local_scalar_dense", "lift_fresh", "nonzero", "is_pinned"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(interpreted(), reason="records what a GPU would be asked to do")
def test_two_steps_launch_the_same_on_the_same_memory() -> None:
    """What differs between them lies in tensors: no number of a step is in a launch."""
    launches: list[tuple[Any, ...]] = []

    def recorder(kernel: Any, grid: Any, args: Any, kwargs: Any) -> None:
        tensors = [tensor_of(a) for a in args]
        numbers = [a for a, t in zip(args, tensors, strict=True) if t is None]
        launches.append((kernel.fn.__name__, grid, numbers, sorted(kwargs.items(), key=str)))

    recorded = []
    with FakeTensorMode(allow_non_fake_inputs=True), record_launches("sm_90", recorder):
        step, batch = _Step(fused=True), _batch()
        held: list[list[torch.Tensor]] = []
        for number in (1, 2, 3):
            step.prepare(number)
            with _NoHost():
                step.compute(*batch)
            recorded.append(list(launches))
            launches.clear()
            held.append(_held(step))
    assert len(recorded[1]) > 35
    assert [name for name, *_ in recorded[1][:2]] == ["_augment_kernel", "_conv2d_relu_fwd_kernel"]
    assert recorded[1] == recorded[2]
    assert all(a is b for a, b in zip(held[1], held[2], strict=True)), "memory was allocated anew"
    assert [len(h) for h in held] == [len(held[0])] * 3


def test_a_number_in_a_launch_would_be_seen() -> None:
    step, batch = _Step(fused=False), _batch()
    step.prepare(1)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), _NoHost():
        step.compute(*batch).item()
    with pytest.raises(AssertionError, match="lift_fresh"), _NoHost():
        torch.tensor([1.0])


def test_what_comes_before_a_step_copies_nothing_from_the_host() -> None:
    """A copy from memory that is not page-locked waits for the GPU to be done."""
    step = _Step(fused=True)
    step.prepare(1)
    with _NoHost():
        step.prepare(2)
    rates = [group["rate"][0] for group in step.optimizer.param_groups]
    assert [float(rate) for rate in rates] == pytest.approx([0.005] * len(rates))


def test_a_capture_that_fails_is_told_and_the_steps_go_on() -> None:
    told: list[str] = []
    calls: list[float] = []

    def compute(x: torch.Tensor) -> torch.Tensor:
        calls.append(float(x))
        return x * 2

    def broken(call: Callable[[], torch.Tensor]) -> Any:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    graphed = Graphed(compute, CPU, told.append, broken)
    results = [float(graphed(torch.tensor(float(i)))) for i in range(WARM_UP + 3)]
    assert results == [2.0 * i for i in range(WARM_UP + 3)]
    assert calls == [float(i) for i in range(WARM_UP + 3)]
    (line,) = told
    assert line.endswith("goes on launch by launch: operation not permitted")


def test_a_capture_that_another_process_lacks_is_not_used() -> None:
    asked, told = [], []

    def other_failed(captured: bool) -> bool:
        asked.append(captured)
        return False

    total = torch.zeros(())
    capture = Captured()
    graphed = Graphed(total.add_, CPU, told.append, capture, other_failed)
    for _ in range(WARM_UP + 3):
        graphed(torch.ones(()))
    assert float(total) == WARM_UP + 3
    assert asked == [True]
    assert capture.captures == 1
    assert len(told) == 1
    assert "another process" in told[0]


def test_memory_that_runs_out_in_a_capture_is_not_hidden() -> None:
    def full(call: Callable[[], torch.Tensor]) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    graphed = Graphed(lambda x: x, CPU, capture=full)
    with pytest.raises(torch.OutOfMemoryError):
        for _ in range(WARM_UP + 1):
            graphed(torch.zeros(()))


def _weights(folder: Path, *options: str) -> dict[str, torch.Tensor]:
    arguments = ["--max-steps", "12", "--batch-size", "16", "--image-size", "224"]
    arguments += ["--precision", "bf16", *options]
    assert train.main([*arguments, "--output", str(folder)]) == 0
    return load_weights(folder / "model.safetensors")[0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_towers_in_a_graph_train_bit_for_bit_as_launches_do(tmp_path: Path) -> None:
    options = ["--gpus", "2", "--image-size", "224"]
    graph = _weights(tmp_path / "graph", "--cuda-graph", *options)
    launches = _weights(tmp_path / "launches", "--no-cuda-graph", *options)
    for name, weight in graph.items():
        assert torch.equal(weight, launches[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["--no-fused-update"], ["--recipe", "paper"]], ids=str)
def test_a_graph_trains_bit_for_bit_as_launches_do(tmp_path: Path, options: list[str]) -> None:
    graph = _weights(tmp_path / "graph", "--cuda-graph", *options)
    launches = _weights(tmp_path / "launches", "--no-cuda-graph", *options)
    for name, weight in graph.items():
        assert torch.equal(weight, launches[name]), name
    logs = [(tmp_path / f / "metrics.jsonl").read_text() for f in ("graph", "launches")]
    losses = [[json.loads(line).get("loss") for line in log.splitlines()] for log in logs]
    assert losses[0] == losses[1]
