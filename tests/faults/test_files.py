"""A run that is killed, or whose disk fails, at the n-th change of a file loses and leaves nothing.

Each fault is followed by the same command. It has to end with the weights, metrics and files of a
run that nothing happened to.
"""

from __future__ import annotations

import errno
import json
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests._commands import ROOT, environment
from tests._runs import SCRIPT, contents, digest, records
from tests.faults._table import Table

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's"),
    pytest.mark.skipif(not (shutil.which("cc")), reason="needs a C compiler"),
]

OPTIONS = ["--image-size", "64", "--batch-size", "20", "--epochs", "2", "--max-steps", "3"]
OPTIONS += ["--checkpoint-every", "1", "--log-every", "1", "--keep-checkpoints", "1"]
OPTIONS += ["--threads", "1"]
KILL, KILL_HALFWAY, KILL_GROUP, FAIL_ONCE, FAIL_FOR_GOOD = range(1, 6)  # as in inject.c

Runner = Callable[[list[str], list[int]], dict[str, Any]]


class World:
    """Runs below one folder, in which files are counted and fail."""

    def __init__(self, folder: Path) -> None:
        self.runs, self.state = folder / "runs", folder / "state"
        self.runs.mkdir()
        self.state.write_bytes(bytes(32))
        library = folder / "inject.so"
        source = Path(__file__).with_name("inject.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        self.environment = {
            **environment(),
            "LD_PRELOAD": str(library),
            "FAULT_ROOT": str(self.runs),
            "FAULT_STATE": str(self.state),
        }
        self.forks = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "faults" / "forks.py")],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def one(self, arguments: list[str], state: list[int]) -> dict[str, Any]:
        """A run in one process."""
        assert self.forks.stdin is not None
        assert self.forks.stdout is not None
        print(json.dumps([arguments, state]), file=self.forks.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.forks.stdout.readline())
        return answer

    def two(self, arguments: list[str], state: list[int]) -> dict[str, Any]:
        """A run of two towers, in their own process group."""
        self.state.write_bytes(struct.pack("4q", *state))
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *arguments, "--gpus", "2"],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        out, err = process.communicate(timeout=120)
        left = _group(process.pid)
        count = struct.unpack("4q", self.state.read_bytes())[0]
        return {"code": process.returncode, "out": out, "err": err, "count": count, "left": left}


def _group(leader: int) -> list[int]:
    """The processes of a group that still run two seconds later."""
    last, found = time.monotonic() + 2, [leader]
    while found and time.monotonic() < last:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(stat[2]) == leader and stat[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("faults"))
    yield made
    made.forks.kill()
    made.forks.wait()


class Expected:
    """What a run of ``processes`` that nothing happens to leaves, and how many changes it makes."""

    def __init__(self, world: World, processes: int) -> None:
        self.run: Runner = world.one if processes == 1 else world.two
        self.processes = processes
        self.folder = world.runs / f"whole-{processes}"
        self.next = world.runs / f"run-{processes}"
        done = self.run([*OPTIONS, "--output", str(self.folder)], [0, 0, 0, 0])
        assert done["code"] == 0, done["err"]
        self.count: int = done["count"]
        assert self.count > 50

    def suffer(self, table: Table, what: str, at: int, kind: int, error: int = 0) -> dict[str, Any]:
        """One fault and the same command again; what is wrong then is asserted."""
        shutil.rmtree(self.next, ignore_errors=True)
        command = [*OPTIONS, "--output", str(self.next)]
        faulty = self.run(command, [0, at, kind, error])
        since = time.monotonic()
        again = self.run(command, [0, 0, 0, 0])
        seconds = time.monotonic() - since
        where = f"{what} at {at} of {self.count}: {faulty['err']}{again['err']}"
        assert again["code"] == 0, where
        equal = all(
            digest(self.next, name) == digest(self.folder, name)
            for name in ("model.safetensors", "best.safetensors")
        ) and records(self.next) == records(self.folder)
        names = {path.relative_to(self.next) for path in contents(self.next)}
        left = names - {path.relative_to(self.folder) for path in contents(self.folder)}
        orphans = [*faulty.get("left", []), *again.get("left", [])]
        table.add(f"{what}, {self.processes} process(es)", equal, len(left), len(orphans), seconds)
        assert equal, where
        assert not left, where
        assert not orphans, where
        status = json.loads((self.next / "run.json").read_text())["status"]
        assert status == "finished", where
        return faulty


@pytest.fixture(scope="module")
def one(world: World) -> Expected:
    return Expected(world, 1)


@pytest.fixture(scope="module")
def two(world: World) -> Expected:
    return Expected(world, 2)


def test_one_process_killed_at_any_change_of_a_file(one: Expected, fault_table: Table) -> None:
    for at in range(1, one.count + 1):
        kind = (KILL, KILL_HALFWAY)[at % 2]
        faulty = one.suffer(fault_table, "kill -9", at, kind)
        assert faulty["code"] == -signal.SIGKILL


def _assert_said_in_a_line(faulty: dict[str, Any], folder: Path) -> None:
    if faulty["code"] == 0:  # nothing that the run needs
        return
    assert faulty["code"] in (1, 2), faulty["err"]
    assert len(faulty["err"].splitlines()) == 1, faulty["err"]
    assert faulty["err"].startswith("train: error: ")


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("kind", [FAIL_ONCE, FAIL_FOR_GOOD])
def test_one_process_whose_disk_fails(
    one: Expected, fault_table: Table, kind: int, error: int
) -> None:
    what = f"{errno.errorcode[error]} {'once' if kind == FAIL_ONCE else 'for good'}"
    for at in range(1 + error % 3, one.count + 1, 8):
        _assert_said_in_a_line(one.suffer(fault_table, what, at, kind, error), one.next)


def test_one_of_two_processes_or_both_killed(two: Expected, fault_table: Table) -> None:
    for number, at in enumerate(range(5, two.count + 1, max(1, two.count // 12))):
        kind = (KILL, KILL_GROUP)[number % 2]
        two.suffer(fault_table, "kill -9", at, kind)


@pytest.mark.parametrize("kind", [FAIL_ONCE, FAIL_FOR_GOOD])
def test_the_disk_of_two_processes_fails(two: Expected, fault_table: Table, kind: int) -> None:
    what = f"ENOSPC {'once' if kind == FAIL_ONCE else 'for good'}"
    for at in range(8, two.count + 1, max(1, two.count // 5)):
        _assert_said_in_a_line(two.suffer(fault_table, what, at, kind, errno.ENOSPC), two.next)
