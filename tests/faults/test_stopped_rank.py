"""A process that stops is named in time, and none is left behind."""

from __future__ import annotations

import functools
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests._commands import alive, run
from tests._runs import digest, steps
from tests.faults._forks import Forks
from tests.faults._runs import (
    EPOCHS,
    TIMEOUT,
    changed,
    command,
    leftovers,
    line_after,
    linux,
    training,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("slow_steps"), linux]

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Callable[[int], str]:
    """The weights' digest of a run of so many processes to which nothing happened."""

    @functools.cache
    def digest_of(processes: int) -> str:
        folder = tmp_path_factory.mktemp("whole")
        done = forks.run(command("ours", *EPOCHS, processes=processes)[1:], folder)
        assert done.returncode == 0, done.stderr
        return digest(folder / "run")

    return digest_of


@pytest.mark.parametrize(
    ("launcher", "processes", "rank"),
    [("ours", 2, 0), ("ours", 4, 3), ("torchrun", 2, 1)],
)
def test_a_stopped_process_is_named_within_the_timeout(
    tmp_path: Path,
    whole: Callable[[int], str],
    forks: Forks,
    launcher: str,
    processes: int,
    rank: int,
) -> None:
    with training(launcher, tmp_path, processes=processes, forks=forks) as (process, pids):
        time.sleep(TIMEOUT / 10)  # it tells its step twenty times in the timeout
        os.kill(pids[rank], signal.SIGSTOP)
        line, taken = line_after(process, "train: error:", time.monotonic())
        print(f"{launcher}, rank {rank} of {processes}: {taken:.1f} s, {line}", end="")
        who = rf"rank {rank} \(host {HOST}\)"
        found = re.search(rf"{who} has not answered for \d+ s, at step (\d+)", line)
        assert found is not None, line
        assert 0 < int(found[1]) <= steps(tmp_path / "run")[-1] + 1
        process.communicate(timeout=60)  # torchrun itself waits half a minute before it kills
        assert process.returncode == 1
    # By whatever launcher: the same number of processes gives the same bits.
    again = forks.run(command("ours", *EPOCHS, processes=processes)[1:], tmp_path)
    assert again.returncode == 0, again.stderr
    assert digest(tmp_path / "run") == whole(processes)
    assert leftovers(tmp_path / "run") == 0
    assert not any(map(alive, pids))


@pytest.mark.parametrize(
    ("where", "step"), [("trainer.Trainer._train_step", 6), ("trainer.Batches._load", 5)]
)
def test_a_process_that_does_not_go_on_is_named(tmp_path: Path, where: str, step: int) -> None:
    """In its seventh step; or in its half of a batch, of which one was the validation's."""
    script = changed(
        tmp_path,
        "import itertools, time\n"
        f"calls, called = itertools.count(1), {where}\n"
        "def stuck(self, *arguments):\n"
        "    if launch.rank() == 1 and next(calls) == 7:\n"
        "        time.sleep(1e6)\n"
        "    return called(self, *arguments)\n"
        f"{where} = stuck\n",
    )
    process = run(command("ours", "--workers", "0", script=script), tmp_path)
    assert process.returncode == 1
    line = process.stderr.splitlines()[-1]
    assert f"rank 1 (host {HOST}) has not gone on for" in line
    assert f"at step {step}" in line


def test_a_run_that_was_stopped_as_a_whole_goes_on(tmp_path: Path, forks: Forks) -> None:
    with training("ours", tmp_path, "--epochs", "1000", forks=forks) as (process, pids):
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
