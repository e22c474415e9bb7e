"""Runs of the small net that last until something happens to them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests._commands import alive, end, start, wait_until, workers
from tests._runs import SCRIPT, steps
from tests.faults._forks import Fork, Forks

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node"]
OPTIONS = ["--image-size", "64", "--batch-size", "8", "--threads", "1", "--log-every", "1"]
OPTIONS += ["--checkpoint-every", "3", "--output", "run"]
EPOCHS = ["--epochs", "14"]
PORT = 29611 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])  # tests run at once
TIMEOUT = 12  # seconds of --timeout: steps take some 50 ms, but on a busy machine


def command(launcher: str, *options: str, script: str = SCRIPT, processes: int = 2) -> list[str]:
    """Processes of one run by ``launcher``, which is ``"ours"`` or ``"torchrun"``."""
    number = str(processes)
    first = [script, "--gpus", number] if launcher == "ours" else [*TORCHRUN, number, script]
    return [*first, *OPTIONS, "--timeout", str(TIMEOUT), *options]


def node(number: int, address: str, *options: str, script: str = SCRIPT) -> list[str]:
    """torchrun on one of two machines, with one process; ``address`` is machine 0's."""
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--node-rank", str(number), "--master-addr", address, "--master-port", str(PORT)]
    return [*torchrun, script, *OPTIONS, "--timeout", str(TIMEOUT), *options]


def changed(folder: Path, code: str) -> str:
    """A script like SCRIPT that runs ``code`` first in every process, with trainer and launch."""
    path = folder / "changed.py"
    path.write_text(
        "import sys\n"
        "from fastalex.distributed import launch\n"
        "from fastalex.training import train, trainer\n"
        "from tests import _small_train\n"
        f"{code}"
        "_small_train.shrink()\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(train.main())\n"
    )
    return str(path)


def trained(folder: Path, count: int) -> bool:
    """Whether the run ``folder / "run"`` has done ``count`` steps."""
    return (folder / "run" / "metrics.jsonl").exists() and len(steps(folder / "run")) >= count


def leftovers(run: Path) -> int:
    """How many temporary files a run has left."""
    return sum(".tmp" in path.name for path in run.rglob("*"))


@contextmanager
def training(
    launcher: str,
    folder: Path,
    *options: str,
    script: str = SCRIPT,
    processes: int = 2,
    forks: Forks | None = None,
) -> Iterator[tuple[subprocess.Popen[str] | Fork, list[int]]]:
    """A run in its first epochs, and its workers; none of them is left afterwards.

    ``forks`` takes a moment where our launcher runs SCRIPT.
    """
    arguments = command(launcher, *EPOCHS, *options, script=script, processes=processes)
    process: subprocess.Popen[str] | Fork
    if forks is not None and launcher == "ours":
        process = forks.start(arguments[1:], folder)
    else:
        process = start(arguments, folder)
    pids: list[int] = []
    try:
        # Long enough for the processes to have told each other of a step, twice a second or so.
        wait_until(lambda: trained(folder, 20), "trained")
        pids = workers(process.pid)
        assert len(pids) == processes
        yield process, pids
        wait_until(lambda: not any(map(alive, pids)), "all processes ended", seconds=10)
    finally:
        end(process)


def line_after(
    process: subprocess.Popen[str] | Fork, text: str, started: float, seconds: float = TIMEOUT
) -> tuple[str, float]:
    """The next line on stderr with ``text``, and how many seconds after ``started`` it came."""
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            taken = time.monotonic() - started
            assert taken < seconds, f"{line!r} came after {taken:.1f} s"
            return line, taken
    raise AssertionError(f"no line with {text!r}")
