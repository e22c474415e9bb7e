"""A run that is killed, or whose disk fails, at the n-th change of a file loses and leaves nothing.

Each fault is followed by the same command. It has to end with the weights, metrics and files of a
run that nothing happened to.
"""

from __future__ import annotations

import errno
import itertools
import json
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests._runs import contents, digest, records
from tests.faults._forks import Forks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's"),
    pytest.mark.skipif(not (shutil.which("cc")), reason="needs a C compiler"),
]

OPTIONS = ["--image-size", "64", "--batch-size", "20", "--epochs", "2", "--max-steps", "3"]
OPTIONS += ["--checkpoint-every", "1", "--log-every", "1", "--keep-checkpoints", "1"]
OPTIONS += ["--threads", "1"]
# As in inject.c.
NUMBERS, LETTERS = struct.Struct("4q"), 4096
KILL, KILL_HALFWAY, KILL_GROUP, TERMINATE, FAIL_ONCE, FAIL_FOR_GOOD = range(1, 7)
NAMES = {KILL: "kill -9", KILL_HALFWAY: "kill -9", KILL_GROUP: "kill -9", TERMINATE: "SIGTERM"}


class Ended(NamedTuple):
    """How a run ended, and the processes of it that are left."""

    code: int
    err: str
    left: list[int]


class World:
    """Runs below one folder, in which changes of files are counted and fail."""

    def __init__(self, folder: Path) -> None:
        self.runs, self.state = folder / "runs", folder / "state"
        self.runs.mkdir()
        self.state.write_bytes(bytes(NUMBERS.size + LETTERS))
        library = folder / "inject.so"
        source = Path(__file__).with_name("inject.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        self.forks = Forks(
            LD_PRELOAD=str(library), FAULT_ROOT=str(self.runs), FAULT_STATE=str(self.state)
        )

    def run(self, arguments: list[str], *fault: int) -> Ended:
        """A run to its end; ``fault`` is the number of the change, the kind, and the errno."""
        with open(self.state, "rb+") as file:
            file.write(NUMBERS.pack(0, *(fault or (0, 0, 0))))
        process = self.forks.start(arguments, self.runs)
        _, err = process.communicate()
        return Ended(process.returncode or 0, err, _group(process.pid))

    def letters(self) -> str:
        """A letter for each change of a file that the last run made."""
        state = self.state.read_bytes()
        return state[NUMBERS.size + 1 :][: NUMBERS.unpack_from(state)[0]].decode()


def _group(leader: int) -> list[int]:
    """The processes of a group that still run two seconds later."""
    last, found = time.monotonic() + 2, [leader]
    while found and time.monotonic() < last:
        found = []
        for entry in filter(lambda entry: entry.name.isdigit(), Path("/proc").iterdir()):
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
    with made.forks:
        yield made


class Expected:
    """What a run of ``processes`` that nothing happens to leaves, and the changes that it makes."""

    def __init__(self, world: World, processes: int) -> None:
        self.run = world.run
        self.options = [*OPTIONS, "--gpus", str(processes)]
        self.alone = processes == 1
        self.folder = world.runs / f"whole-{processes}"
        self.next = world.runs / f"run-{processes}"
        done = self.run([*self.options, "--output", str(self.folder)])
        assert done.code == 0, done.err
        self.letters = world.letters()
        assert len(self.letters) > 50

    def places(self, each: int, kinds: str = "") -> list[int]:
        """Changes of files: of every kind (or of ``kinds``) up to ``each``, evenly spaced."""
        found = []
        for kind in sorted(set(kinds or self.letters)):
            all_places = [i for i, letter in enumerate(self.letters, 1) if letter == kind]
            number = min(each, len(all_places))
            found += [
                all_places[(2 * i + 1) * len(all_places) // (2 * number)] for i in range(number)
            ]
        return sorted(found)

    def suffer(self, at: int, kind: int, error: int = 0) -> Ended:
        """One fault and the same command again; what is wrong then is asserted."""
        once = "once" if kind == FAIL_ONCE else "for good"
        what = NAMES.get(kind) or f"{errno.errorcode[error]} {once}"
        shutil.rmtree(self.next, ignore_errors=True)
        command = [*self.options, "--output", str(self.next)]
        faulty = self.run(command, at, kind, error)
        again = self.run(command)
        where = f"{what} at {at} of {len(self.letters)}: {faulty.err}{again.err}"
        assert again.code == 0, where
        for name in ("model.safetensors", "best.safetensors"):
            assert digest(self.next, name) == digest(self.folder, name), where
        assert records(self.next) == records(self.folder), where
        names = {path.relative_to(self.next) for path in contents(self.next)}
        assert names <= {path.relative_to(self.folder) for path in contents(self.folder)}, where
        assert not [*faulty.left, *again.left], where
        status = json.loads((self.next / "run.json").read_text())["status"]
        assert status == "finished", where
        return faulty


@pytest.fixture(scope="module", params=[1, 2, 4])
def whole(request: pytest.FixtureRequest, world: World) -> Expected:
    return Expected(world, request.param)


def test_killed_at_a_change_of_a_file(whole: Expected) -> None:
    for number, at in enumerate(whole.places(7 if whole.alone else 1)):
        kind = (KILL, KILL_HALFWAY, KILL_GROUP)[number % 3]
        faulty = whole.suffer(at, kind)
        if whole.alone:
            assert faulty.code == -signal.SIGKILL


def test_asked_to_end_at_a_change_of_a_file(whole: Expected) -> None:
    for at in whole.places(1, "" if whole.alone else "rw"):
        faulty = whole.suffer(at, TERMINATE)
        assert faulty.code in (0, 75), faulty.err  # 0 where all was done
        if faulty.code:
            assert len(faulty.err.splitlines()) == 1, faulty.err
            assert faulty.err.startswith("train: stopped by SIGTERM ")


@pytest.mark.parametrize("kind", [FAIL_ONCE, FAIL_FOR_GOOD])
def test_a_disk_that_fails(whole: Expected, kind: int) -> None:
    kinds, errors = "w", [errno.ENOSPC]
    if whole.alone:  # beside it no process sees the number of the error
        kinds, errors = "mosw", [errno.ENOSPC, errno.EROFS, errno.EIO]
    for at, error in itertools.product(whole.places(1, kinds), errors):
        faulty = whole.suffer(at, kind, error)
        if faulty.code == 0:  # nothing that the run needs
            continue
        assert faulty.code in (1, 2), faulty.err
        assert len(faulty.err.splitlines()) == 1, faulty.err
        assert faulty.err.startswith("train: error: ")
