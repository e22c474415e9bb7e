"""A process that stops is named in time, and none is left behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from tests._commands import end, run, start, wait_until, workers
from tests.faults._runs import (
    TIMEOUT,
    changed,
    command,
    line_after,
    linux,
    sha256,
    steps,
    training,
)

pytestmark = [pytest.mark.slow, linux]

HOST = socket.gethostname()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("launcher", ["ours", "torchrun"])
def test_a_stopped_process_is_named_within_the_timeout(
    tmp_path: Path, launcher: str, rank: int
) -> None:
    with training(launcher, tmp_path) as (process, pids):
        os.kill(pids[rank], signal.SIGSTOP)
        line, taken = line_after(process, "train: error:", time.monotonic())
        print(f"{launcher}, rank {rank}: {taken:.1f} s, {line}", end="")
        who = rf"rank {rank} \(host {HOST}\)"
        found = re.search(rf"{who} has not answered for \d+ s, at step (\d+)", line)
        assert found is not None, line
        assert 0 < int(found[1]) <= steps(tmp_path / "run")[-1] + 1
        if launcher == "ours" or rank == 1:  # rank 0 is who knows the run's folder
            assert re.search(r"goes on after step \d+$", line.strip())
        process.communicate(timeout=60)  # torchrun itself waits half a minute before it kills
        assert process.returncode == 1


def test_a_process_that_does_not_go_on_is_named(tmp_path: Path) -> None:
    script = changed(
        tmp_path,
        "import time\n"
        "train_step = engine.Trainer._train_step\n"
        "def stuck(self, batch):\n"
        "    if launch.rank() == 1 and self.step == 6:\n"
        "        time.sleep(1e6)\n"
        "    train_step(self, batch)\n"
        "engine.Trainer._train_step = stuck\n",
    )
    process = run(command("ours", script=script), tmp_path)
    assert process.returncode == 1
    line = process.stderr.splitlines()[-1]
    assert f"rank 1 (host {HOST}) has not gone on for" in line
    assert "at step 6" in line


def test_a_run_that_was_stopped_as_a_whole_goes_on(tmp_path: Path) -> None:
    with training("ours", tmp_path) as (process, pids):
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(2 * TIMEOUT)
        os.killpg(process.pid, signal.SIGCONT)
        before = steps(tmp_path / "run")[-1]
        time.sleep(TIMEOUT)
        assert process.poll() is None
        assert steps(tmp_path / "run")[-1] > before + 1
        os.kill(pids[1], signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 75, stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_what_was_killed(tmp_path: Path, rank: int) -> None:
    epochs = ["--epochs", "3"]
    (tmp_path / "whole").mkdir()
    whole = run(command("ours", *epochs), tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    torchrun, rest = command("torchrun", *epochs)[:4], command("torchrun", *epochs)[4:]
    process = start([*torchrun, "--max-restarts", "2", *rest], tmp_path)
    try:
        wait_until(lambda: len(steps(tmp_path / "run")) >= 4, "trained")
        os.kill(workers(process.pid, "_small_train")[rank], signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        end(process)
    assert process.returncode == 0, stderr
    assert stdout.count("resumed: after step") == 1
    assert sha256(tmp_path / "run") == sha256(tmp_path / "whole" / "run")
