"""Our own launcher: what its processes listen on, what they read, and how a signal ends them."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastalex.distributed import world
from fastalex.distributed.watchdog import Watchdog
from fastalex.training import prepare
from fastalex.training.options import parse_arguments
from fastalex.training.prepare import RunConfig
from tests._commands import alive, descendants, end, run, start, workers
from tests.faults._runs import changed, command, linux, training

gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")


def _sockets(pids: list[int]) -> list[tuple[str, str]]:
    """What these processes listen on, or receive datagrams on: protocol and address."""
    inodes = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(file))
            inodes |= {found[1]} if found else set()
    sockets = []
    for protocol in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
        for line in Path(f"/proc/{pids[0]}/net/{protocol}").read_text().splitlines()[1:]:
            local, _, state, *_, inode = line.split()[1:10]
            if inode in inodes and (state == "0A" or not protocol.startswith("tcp")):
                address, _, port = local.partition(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                place = ipaddress.ip_address(b"".join(words))  # the kernel prints host byte order
                sockets.append((protocol, f"{place} {int(port, 16)}"))
    return sockets


@pytest.mark.slow
@gloo
@linux
def test_no_process_listens_beyond_this_machine(tmp_path: Path) -> None:
    with training("ours", tmp_path) as (process, pids):
        tree = descendants(process.pid)
        assert set(pids) < set(tree)
        sockets = _sockets(tree)
        print(*sockets, sep="\n")
        end(process)
    assert len([protocol for protocol, _ in sockets if protocol == "tcp"]) >= 3  # each has one
    places = [ipaddress.ip_address(place.split()[0]) for _, place in sockets]
    assert all(place.is_loopback for place in places)


@pytest.mark.slow
@gloo
@pytest.mark.parametrize("launcher", ["ours", "torchrun"])
def test_nothing_from_a_socket_is_unpickled(tmp_path: Path, launcher: str) -> None:
    script = changed(
        tmp_path,
        "import torch.distributed.distributed_c10d as c10d\n"
        "def refuse(*_):\n"
        "    raise SystemExit('unpickled')\n"
        "assert c10d._tensor_to_object\n"
        "c10d._tensor_to_object = refuse\n",
    )
    # Two replicas, whose loss is not finite: they gather the names of its images.
    process = run(command(launcher, "--variant", "owt", "--lr", "1e30", script=script), tmp_path)
    assert "the loss is " in process.stderr
    assert "and 5 more samples" in process.stderr
    assert "unpickled" not in process.stderr


@pytest.mark.slow
@gloo
@linux
def test_four_processes_are_two_nets_of_two_towers(tmp_path: Path) -> None:
    options = ["--max-steps", "2"]
    arguments = [*command("ours", *options)]
    arguments[arguments.index("--gpus") + 1] = "4"
    process = run(arguments, tmp_path)
    assert process.returncode == 0, process.stderr
    assert "two towers, one per process, 2 replicas" in process.stdout


BUSY = """
import os, signal, sys, time
from fastalex.common.interrupts import SIGNALS, Interrupted, noticed, raised
from fastalex.distributed import launch
if "RANK" in os.environ:
    with raised(), noticed():
        launch.greet_launcher()
        os.write(1, os.environ["RANK"].encode())
        while True:
            time.sleep(1)
try:
    launch.start([sys.executable, "busy.py"], 2)
except Interrupted as stop:
    print(" ended by", stop, flush=True)
"""


@pytest.mark.slow
@linux
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_a_second_signal_leaves_at_once(tmp_path: Path, signum: int) -> None:
    (tmp_path / "busy.py").write_text(BUSY)
    process = start(["busy.py"], tmp_path)
    try:
        assert process.stdout is not None
        assert sorted(process.stdout.read(2)) == ["0", "1"]
        pids = workers(process.pid)
        os.kill(process.pid, signum)
        time.sleep(2)
        assert process.poll() is None  # they may be saving
        os.kill(process.pid, signum)
        stdout, stderr = process.communicate(timeout=10)
    finally:
        end(process)
    assert stdout == f" ended by {signal.Signals(signum).name}\n"
    assert stderr == ""
    assert not any(map(alive, pids))


@pytest.mark.slow
@gloo
@linux
def test_a_signal_to_one_process_reaches_all(tmp_path: Path) -> None:
    script = changed(
        tmp_path,
        "import signal\n"
        "run = trainer.Trainer.run\n"
        "def seen(self):\n"
        "    try:\n"
        "        run(self)\n"
        "    except launch.Interrupted as stop:\n"
        "        print(f'rank {launch.rank()}: {stop} after {self.step}', flush=True)\n"
        "        raise\n"
        "trainer.Trainer.run = seen\n",
    )
    with training("ours", tmp_path, script=script) as (process, pids):
        os.kill(pids[1], signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 75, stderr
    seen = re.findall(r"^rank (\d): SIGTERM after (\d+)$", stdout, re.MULTILINE)
    assert sorted(rank for rank, _ in seen) == ["0", "1"]
    assert len({step for _, step in seen}) == 1
    assert f"stopped by SIGTERM after step {seen[0][1]}; " in stderr


class Board(dict[str, bytes]):
    """A store in this process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) or _note(host="b") for key in keys]


def _note(**about: object) -> bytes:
    return json.dumps({"host": "b", "done": 1, "step": 7, **about}).encode()


@pytest.mark.parametrize(
    ("theirs", "name"),
    [
        ({"state": "runs"}, r"rank 1 \(host b\) has not answered for \d+ s, at step 7"),
        ({"state": "ended"}, ""),
    ],
)
def test_a_process_whose_notes_stop_is_named(theirs: dict[str, str], name: str) -> None:
    board = Board()
    board["heartbeat of rank 1"] = _note(**theirs)
    watch = Watchdog(board, 0, 2, print)
    watch.limit(1.0)
    watch.progress(7)
    assert watch._stuck(time.monotonic() + 100) == ""  # in the first step
    watch.progress(7)
    watch._take(board.multi_get(watch._keys))
    now = time.monotonic()
    assert watch._stuck(now + 0.5) == ""
    watch._reached = watch._moved[0] = now + 0.9
    assert re.fullmatch(name, watch._stuck(now + 0.9))
    watch._reached = now
    assert "the other side can't be reached: no answer from" in watch._stuck(now + 0.9)


def test_a_disk_may_take_its_time() -> None:
    """What writes and still sends notes is waited for longer; so is all before a first step."""
    watch = Watchdog(Board(), 0, 2, print)
    watch.limit(10)
    now = time.monotonic()
    assert watch._stuck(now + 1000) == ""
    watch.progress(7)
    watch.progress(7)
    watch._take([_note(done=2, host="a"), _note(doing="writing a checkpoint")])
    for seconds, line in ((50, ""), (101, "rank 1 (host b) has not gone on for 101 s, at step 7")):
        watch._heard[1] = watch._reached = now + seconds
        assert watch._stuck(now + seconds).startswith(line or " ") == bool(line)


def test_each_process_may_see_one_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    shown = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in shown.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match="2 processes need 2 GPUs and there is 1"):
        world.find_world(None, "paper")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert world.find_world(None, "paper").device_type == "cuda"
    assert world.device_index() == 0


def test_a_run_config_travels_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    options = parse_arguments(["--lr-drop", "1/3,0.7", "--output", "run"])
    folder, config = prepare.prepare(options)
    folder.release()
    assert config is not None
    again = RunConfig.from_json(config.to_json())
    for name in ("settings", "world", "folder", "classes", "normalization", "unreadable"):
        assert getattr(again, name) == getattr(config, name)
    assert [len(s) for s in again.datasets] == [len(s) for s in config.datasets]


@pytest.mark.slow
def test_a_process_that_does_not_start_is_named(tmp_path: Path) -> None:
    script = changed(
        tmp_path,
        "import os, time\n"
        "launch._JOINING, launch._SAY = 6.0, 2.0\n"
        "meet = launch.rendezvous\n"
        "def late():\n"
        "    time.sleep(60 * (os.environ.get('RANK') == '1'))\n"
        "    return meet()\n"
        "launch.rendezvous = late\n",
    )
    done = run(command("ours", script=script), tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert lines[0].startswith("train: rank 0: waits for rank 1 to start, for ")
    assert "train: error: rank 0: waits for rank 1 to start, and gave up after 6 s" in lines
    assert all(line.startswith("train: ") for line in lines)
