"""A step as one CUDA graph: what a capture needs, as far as it can be seen without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastalex_kernels as kernels
from fastalex.distributed.exchange import LoopbackExchange
from fastalex.training import train
from fastalex.training.cuda_graph import WARM_UP, Graph
from fastalex.training.weights import load_weights
from fastalex.tuning.train_steps import Training, train_step
from fastalex_kernels.common.launch import call
from fastalex_kernels.common.program import Program


class Captures:
    """Stands for CUDA graphs: what is captured runs when it is replayed, on the same tensors."""

    def __init__(self) -> None:
        self.count = self.replays = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self.count += 1

        def replay() -> None:
            self.replays += 1
            program.set_inputs(held)
            run()

        program = run.__self__  # type: ignore[attr-defined]
        held = [launch.arguments[0] for launch in program.launches[:1]]
        return replay


def _program(total: torch.Tensor) -> tuple[Program, torch.Tensor]:
    """Adds its input to ``total``; recorded with an input of 0."""
    given = torch.zeros(3)
    program = Program([given])
    with program.recording():
        call(total.add_, given)
    return program, given


def _graph(total: torch.Tensor, **options: Any) -> tuple[Graph, list[str]]:
    told: list[str] = []
    options = {"exchange": None, "capture": Captures()} | options
    return Graph(_program(total)[0], tell=told.append, **options), told


def test_every_run_does_its_work_once() -> None:
    total, captures = torch.zeros(3), Captures()
    graph, told = _graph(total, capture=captures)
    buffers = [torch.zeros(3), torch.zeros(3)]
    for number in range(1, 9):
        buffer = buffers[number % 2]
        buffer.fill_(number)
        graph.run([buffer])
    assert total.tolist() == [36.0] * 3
    assert captures.count == 2, "one for each of the loader's buffers"
    assert captures.replays == 8 - (WARM_UP - 1)
    assert not told


def test_inputs_in_other_memory_are_copied() -> None:
    total = torch.zeros(3)
    graph, _ = _graph(total)
    given = [torch.full((3,), float(number)) for number in range(1, 9)]
    for x in given:
        graph.run([x])
    assert total.tolist() == [36.0] * 3


def _broken(run: Callable[[], None]) -> Any:
    raise RuntimeError("operation not permitted\nwhen stream is capturing")


def test_a_capture_that_fails_is_told_once_and_the_runs_go_on() -> None:
    total = torch.zeros(3)
    graph, told = _graph(total, capture=_broken)
    for _ in range(WARM_UP + 3):
        graph.run([torch.ones(3)])
    assert total.tolist() == [WARM_UP + 3.0] * 3
    (line,) = told
    assert line.endswith("goes on launch by launch: operation not permitted")


def test_a_capture_that_the_other_tower_lacks_is_not_used() -> None:
    class Other(LoopbackExchange):
        def transfer(self, sent: torch.Tensor) -> Any:
            transfer = super().transfer(sent)
            transfer.wait = lambda: transfer.received.zero_()  # type: ignore[method-assign]
            return transfer

    total, captures = torch.zeros(3), Captures()
    graph, told = _graph(total, exchange=Other(), capture=captures)
    for _ in range(WARM_UP + 3):
        graph.run([torch.ones(3)])
    assert total.tolist() == [WARM_UP + 3.0] * 3
    assert (captures.count, captures.replays) == (1, 0)
    assert "another process" in told[0]
    both, _ = _graph(total, exchange=LoopbackExchange(), capture=captures)
    for _ in range(WARM_UP + 3):
        both.run([torch.ones(3)])
    assert captures.replays > 0


def test_memory_that_runs_out_in_a_capture_is_not_hidden() -> None:
    def full(run: Callable[[], None]) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    graph, _ = _graph(torch.zeros(3), capture=full)
    with pytest.raises(torch.OutOfMemoryError):
        for _ in range(WARM_UP + 1):
            graph.run([torch.zeros(3)])


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
    assert _losses(tmp_path / "graph") == _losses(tmp_path / "launches")


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True], ids=["launches", "graph"])
def test_kernels_that_start_early_train_bit_for_bit(graph: bool) -> None:
    """A kernel that read before it had waited, or wrote, would not do so alike each time."""
    training, losses = Training(torch.device("cuda"), "bf16", 128), []
    for early in (True, False):
        step = train_step(training, graph=graph, dependent_launch=early)
        losses.append(torch.stack([step() for _ in range(50)]))
    assert torch.equal(*losses)


TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--precision", "float32"],
        ["--precision", "tf32"],
        ["--precision", "fp16"],
        ["--variant", "owt", "--image-size", "224"],
        pytest.param(["--gpus", "2"], marks=TWO),
        pytest.param(["--gpus", "2", "--variant", "owt"], marks=TWO),
    ],
    ids=str,
)
def test_what_a_user_gets_is_checked_and_trains(
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With graph, fused updates and the rest as they are by default, beside torch's operators."""
    monkeypatch.setenv("FASTALEX_CHECK", "always")
    arguments = ["--max-steps", "12", "--log-every", "1", *options]
    assert train.main([*arguments, "--output", str(tmp_path / "ours")]) == 0
    said = capfd.readouterr()
    assert "kernels are wrong here" not in said.out + said.err
    losses = _losses(tmp_path / "ours")
    assert len(losses) == 12
    if "--gpus" not in options:  # the choice of a backend does not reach other processes
        with kernels.backend("aten"):
            assert train.main([*arguments, "--output", str(tmp_path / "torch")]) == 0
        # Later steps of so high a rate tell roundings apart.
        assert losses[:3] == pytest.approx(_losses(tmp_path / "torch")[:3], rel=0.05)


def _losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "step"]
