"""Real runs asked to end, started twice, restarted or unheard: the same command goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastalex.training.weights import load_weights
from tests._commands import alive, end, environment, start, wait_until, workers
from tests._runs import SCRIPT, contents, digest, records, steps
from tests.faults._forks import Forks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("slow_steps"),  # so that a signal comes in the middle of an epoch
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]

# 40 images: 20 steps an epoch, and no checkpoint within one but those that are asked for.
OPTIONS = ["--image-size", "64", "--batch-size", "2", "--epochs", "2", "--threads", "1"]
OPTIONS += ["--log-every", "1", "--lr", "0.0005"]


@pytest.fixture(scope="module", params=[1, 2])
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, forks: Forks
) -> Path:
    """The folder of a run that nothing happened to; its name ends with the number of processes."""
    folder = tmp_path_factory.mktemp("whole")
    run = f"run-{request.param}"
    done = forks.run([*OPTIONS, "--gpus", str(request.param), "--output", run], folder)
    assert done.returncode == 0, done.stderr
    return folder / run


def _wait_for_step(folder: Path, step: int) -> None:
    metrics = folder / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(steps(folder)) >= step, f"at step {step}")


def _assert_as(folder: Path, whole: Path) -> None:
    assert records(folder) == records(whole)
    for name in ("model.safetensors", "best.safetensors"):
        assert digest(folder, name) == digest(whole, name)
    names = [{path.relative_to(run) for path in contents(run)} for run in (folder, whole)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("signum", "group"),
    [
        (signal.SIGTERM, False),
        (signal.SIGUSR1, True),
        (signal.SIGHUP, False),
        (signal.SIGINT, True),  # as a terminal does
    ],
)
def test_a_signal_saves_within_an_epoch(
    whole: Path, tmp_path: Path, forks: Forks, signum: signal.Signals, group: bool
) -> None:
    command = [*OPTIONS, "--gpus", whole.name[-1], "--output", "run"]
    process = forks.start(command, tmp_path)
    try:
        _wait_for_step(tmp_path / "run", 5)
        pids = [process.pid, *workers(process.pid)]
        (os.killpg if group else os.kill)(process.pid, signum)
        _, stderr = process.communicate(timeout=30)
    finally:
        end(process)
    assert process.returncode == (130 if signum == signal.SIGINT else 75)
    said = [line for line in stderr.splitlines() if not line.startswith("epoch ")]
    assert len(said) == 1, stderr
    found = re.fullmatch(
        rf"train: stopped by {signum.name} after step (\d+); run the same command again to go on",
        said[0],
    )
    assert found is not None, stderr
    assert int(found[1]) % 20  # in the middle of an epoch
    assert int(found[1]) == steps(tmp_path / "run")[-1]  # nothing that was done is lost
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    orphans = list(filter(alive, pids))
    again = forks.run(command, tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"resumed: after step {found[1]}" in again.stdout
    _assert_as(tmp_path / "run", whole)
    assert not orphans


def test_of_two_starts_at_once_one_goes_on(whole: Path, tmp_path: Path, forks: Forks) -> None:
    command = [*OPTIONS, "--gpus", whole.name[-1], "--output", "run"]
    # What a kill leaves is there for both to find, as after a requeue.
    first = forks.start(command, tmp_path)
    _wait_for_step(tmp_path / "run", 3)
    os.killpg(first.pid, signal.SIGKILL)
    end(first)
    both = [forks.start(command, tmp_path) for _ in range(2)]
    try:
        ended = [(process, *process.communicate()) for process in both]
    finally:
        for process in both:
            end(process)
    codes = sorted(process.returncode or 0 for process, _, _ in ended)
    refused = [stderr for process, _, stderr in ended if process.returncode == 2]
    if codes == [0, 0]:  # one waited until the other had finished
        assert ["is finished" in stdout for _, stdout, _ in ended].count(True) == 1
    else:
        assert codes == [0, 2], ended
        line = "train: error: --output run: another process trains in this folder"
        assert refused[0].splitlines() == [line]
    _assert_as(tmp_path / "run", whole)


@pytest.mark.parametrize("whole", [2], indirect=True)
def test_two_processes_leave_off_where_one_goes_on(
    whole: Path, tmp_path: Path, forks: Forks
) -> None:
    first = forks.start([*OPTIONS, "--gpus", "2", "--output", "run"], tmp_path)
    _wait_for_step(tmp_path / "run", 3)
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait() == 75
    again = forks.run(["--resume", "run", "--gpus", "1"], tmp_path)
    assert again.returncode == 0, again.stderr
    assert "1 processes instead of 2" in again.stdout
    assert "to rounding, not bit for bit" in again.stdout
    for ours, theirs in zip(records(tmp_path / "run"), records(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)  # a handful of steps
    weights = load_weights(whole / "model.safetensors")[0]
    for name, weight in load_weights(tmp_path / "run" / "model.safetensors")[0].items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("whole", [2], indirect=True)
@pytest.mark.parametrize("output", [True, False])
def test_torchrun_restarts_go_on(whole: Path, tmp_path: Path, output: bool) -> None:
    """A killed worker of torchrun's: its next attempt is the same command."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    place = ["--output", "runs/run"] if output else []
    options = [*OPTIONS, "--checkpoint-every", "3", *place]
    process = start([*torchrun, "--max-restarts", "3", SCRIPT, *options], tmp_path)
    folder = tmp_path / "runs" / ("run" if output else "paper-0-001")
    try:
        _wait_for_step(folder, 8)
        pids = workers(process.pid)
        os.kill(pids[int(output)], signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=300)
    finally:
        end(process)
    assert process.returncode == 0, stderr
    assert re.search(r"resumed: after step (6|9|12|15|18)", stdout)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder.name]
    assert steps(folder) == list(range(1, 41))
    assert digest(folder) == digest(whole)


@pytest.mark.parametrize("gpus", ["1", "2"])
def test_a_run_goes_on_when_nobody_reads_its_output(tmp_path: Path, gpus: str) -> None:
    command = [sys.executable, SCRIPT, *OPTIONS, "--gpus", gpus, "--output", "run"]
    reader, writer = os.pipe()
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=writer, stderr=writer
    )
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    assert process.wait(timeout=120) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    assert steps(tmp_path / "run") == list(range(1, 41))
