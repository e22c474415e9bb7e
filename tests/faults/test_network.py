"""The link between two machines is cut: both sides say so in time, and the run goes on after it.

Each machine is a network namespace of this one; a pair of virtual devices is the link.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests._commands import alive, descendants, end, environment, wait_until
from tests._runs import digest
from tests.faults._forks import Forks
from tests.faults._runs import EPOCHS, command, leftovers, line_after, linux, node, trained

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("slow_steps"), linux]

NAMES = ("fastalex-a", "fastalex-b")
ADDRESSES = ("10.213.7.1", "10.213.7.2")  # of a /30 that exists in the two namespaces alone


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)


def _device(machine: int, state: str) -> None:
    _ip("-n", NAMES[machine], "link", "set", f"fx{machine}", state)


@pytest.fixture
def machines() -> Iterator[None]:
    """Two namespaces with a link between them."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2, for network namespaces")
    try:
        for name in NAMES:
            _ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        ends = ["fx0", "netns", NAMES[0], "type", "veth", "peer", "name", "fx1", "netns", NAMES[1]]
        _ip("link", "add", *ends)
        for machine, address in enumerate(ADDRESSES):
            _ip("-n", NAMES[machine], "addr", "add", f"{address}/30", "dev", f"fx{machine}")
            _ip("-n", NAMES[machine], "link", "set", "lo", "up")
            _device(machine, "up")
        yield
    finally:
        for name in NAMES:
            _ip("netns", "del", name)


def _start(machine: int, folder: Path) -> subprocess.Popen[str]:
    python = [sys.executable, *node(machine, ADDRESSES[0], *EPOCHS)]
    return subprocess.Popen(
        ["ip", "netns", "exec", NAMES[machine], *python],
        cwd=folder,
        env={**environment(), "GLOO_SOCKET_IFNAME": f"fx{machine}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        end(process)


@pytest.mark.usefixtures("machines")
def test_both_sides_of_a_cut_link_say_so_and_the_run_goes_on(tmp_path: Path, forks: Forks) -> None:
    (tmp_path / "whole").mkdir()
    whole = forks.run(command("ours", *EPOCHS)[1:], tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr

    processes = [_start(machine, tmp_path) for machine in (0, 1)]
    try:
        wait_until(lambda: trained(tmp_path, 8), "trained")
        pids = [pid for process in processes for pid in descendants(process.pid)[1:]]
        assert len(pids) >= 2
        _device(0, "down")
        cut = time.monotonic()
        lines = [line_after(process, "train: error:", cut) for process in processes]
        for process in processes:
            process.communicate(timeout=60)
    finally:
        _end(processes)
    for line, taken in lines:
        print(f"{taken:.1f} s: {line}", end="")
    near, far = (line for line, _ in lines)
    assert "rank 0: rank 1 (host " in near
    assert "has not answered for" in near
    assert "goes on after step" in near
    assert f"rank 1: the other side can't be reached: no answer from {ADDRESSES[0]}" in far
    assert "at step" in far
    assert all(process.returncode == 1 for process in processes)

    _device(0, "up")
    processes = [_start(machine, tmp_path) for machine in (0, 1)]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        _end(processes)
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "resumed: after step" in outputs[0][0]
    assert digest(tmp_path / "run") == digest(tmp_path / "whole" / "run")
    assert leftovers(tmp_path / "run") == 0
    assert not any(map(alive, pids))
