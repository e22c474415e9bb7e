"""Runs that a process with everything imported forks, and how they end: see ``forks.py``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests._commands import ROOT, alive, environment, wait_until
from tests._small_train import STEP_SECONDS


class Fork:
    """A run, with what tests need of ``subprocess.Popen``."""

    def __init__(self, forks: Forks, pid: int, outputs: tuple[Path, Path]) -> None:
        self.pid, self._forks, self._outputs = pid, forks, outputs
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and not alive(self.pid):
            self.returncode = self._forks.ask(self.pid)
        return self.returncode

    def wait(self, timeout: float = 120) -> int | None:
        wait_until(lambda: self.poll() is not None, "the run ended", timeout)
        return self.returncode

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Wait for its end; what it printed on stdout and on stderr."""
        self.wait(timeout)
        out, err = (path.read_text() for path in self._outputs)
        return out, err

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    @property
    def stderr(self) -> Iterator[str]:
        """The lines of stderr as they come."""
        with self._outputs[1].open() as file:
            while (line := file.readline()) or self.poll() is None:
                if line:
                    yield line
                else:
                    time.sleep(0.02)


class Forks:
    """A context in which ``start`` forks runs.

    Args:
        variables: of the environment of all runs.
    """

    def __init__(self, **variables: str) -> None:
        self._variables = variables
        self._outputs = tempfile.TemporaryDirectory()
        self._started = 0

    def __enter__(self) -> Forks:
        self._server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "faults" / "forks.py")],
            env={**environment(), **self._variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.communicate()
        self._outputs.cleanup()

    def ask(self, request: object) -> int:
        """What the server answers."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def start(self, arguments: list[str], folder: Path) -> Fork:
        """``python -m fastalex.train *arguments`` in ``folder``."""
        self._started += 1
        out, err = (Path(self._outputs.name) / f"{self._started}.{n}" for n in ("out", "err"))
        for path in (out, err):
            path.touch()
        request: dict[str, Any] = {
            "arguments": arguments,
            "folder": str(folder),
            "out": str(out),
            "err": str(err),
        }
        request["seconds"] = os.environ.get(STEP_SECONDS, "0")
        return Fork(self, self.ask(request), (out, err))

    def run(self, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        """The same, to its end."""
        process = self.start(arguments, folder)
        stdout, stderr = process.communicate()
        assert process.returncode is not None
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)
