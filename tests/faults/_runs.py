"""Runs of the small net that last until something happens to them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastalex.checkpoint import load_weights
from tests._commands import ROOT, alive, end, start, wait_until, workers

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

SCRIPT = str(ROOT / "tests" / "_small_train.py")
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
OPTIONS = ["--image-size", "64", "--batch-size", "8", "--threads", "1", "--log-every", "1"]
OPTIONS += ["--checkpoint-every", "3", "--output", "run"]
TIMEOUT = 6  # seconds of --timeout: steps take some 50 ms


def command(launcher: str, *options: str, script: str = SCRIPT) -> list[str]:
    """Two processes by ``launcher``, which is ``"ours"`` or ``"torchrun"``."""
    first = [script, "--gpus", "2"] if launcher == "ours" else [*TORCHRUN, script]
    return [*first, *OPTIONS, "--timeout", str(TIMEOUT), *options]


def node(number: int, address: str, *options: str, script: str = SCRIPT) -> list[str]:
    """torchrun on one of two machines, with one process; ``address`` is machine 0's."""
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--node-rank", str(number), "--master-addr", address, "--master-port", "29611"]
    return [*torchrun, script, *OPTIONS, "--timeout", str(TIMEOUT), *options]


def changed(folder: Path, code: str) -> str:
    """A script like SCRIPT that runs ``code`` first in every process, with engine and launch."""
    path = folder / "changed.py"
    path.write_text(
        "import sys\n"
        "from fastalex import engine, launch, train\n"
        "from tests import _small_train\n"
        f"{code}"
        "_small_train.shrink()\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(train.main())\n"
    )
    return str(path)


def steps(run: Path) -> list[int]:
    """The steps of the records in metrics.jsonl."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [r["step"] for r in map(json.loads, lines) if r["kind"] == "step"]


def sha256(run: Path) -> str:
    """Of the weights that a run left."""
    return str(load_weights(run / "model.safetensors")[1]["sha256"])


@contextmanager
def training(
    launcher: str, folder: Path, *options: str, after: int = 4, script: str = SCRIPT
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A run that has done ``after`` steps, and its two workers; none is left afterwards."""
    process = start(command(launcher, "--epochs", "5000", *options, script=script), folder)
    word = "spawn_main" if launcher == "ours" else Path(script).name
    pids: list[int] = []
    try:
        wait_until(lambda: len(steps(folder / "run")) >= after, "trained")
        pids = workers(process.pid, word)
        assert len(pids) == 2
        yield process, pids
        wait_until(lambda: not any(map(alive, pids)), "all processes ended", seconds=10)
    finally:
        end(process)


def line_after(
    process: subprocess.Popen[str], text: str, started: float, seconds: float = TIMEOUT
) -> tuple[str, float]:
    """The next line on stderr with ``text``, and how many seconds after ``started`` it came."""
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            taken = time.monotonic() - started
            assert taken < seconds, f"{line!r} came after {taken:.1f} s"
            return line, taken
    raise AssertionError(f"no line with {text!r}")
