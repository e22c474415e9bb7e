"""Starts training runs as forks of one process that has imported everything: each takes a moment.

    python tests/faults/forks.py < REQUESTS > ANSWERS

Reads lines of JSON. The arguments of ``start`` start a run, the leader of a process group, and are
answered with its number; a number is answered with how that run ended, once it has. Runs have the
small net of ``_small_train``; the processes of one with several are forks, too.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from types import SimpleNamespace
from typing import Any, NoReturn

import torch

from fastalex.distributed import launch
from fastalex.training import train
from tests import _small_train


def start(arguments: list[str], folder: str, out: str, err: str, seconds: str) -> int:
    """Fork; the child is the run, and never returns. ``seconds`` are STEP_SECONDS."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    os.chdir(folder)
    os.environ[_small_train.STEP_SECONDS] = seconds
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    run(arguments)


def run(arguments: list[str]) -> NoReturn:
    """Be the command, and end."""
    code = 70  # a traceback
    try:
        code = train.main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Forked:
    """What ``launch`` needs of ``subprocess.Popen``, as a fork that runs the same command line."""

    returncode: int | None = None

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.pid = os.fork()
        if not self.pid:
            os.environ.update(env)
            run(command[command.index("fastalex.train") + 1 :])

    def poll(self, flags: int = os.WNOHANG) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, flags))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def wait(self) -> None:
        self.poll(0)

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)], 0.1)  # imports more, once for all
    _small_train.shrink()
    launch.subprocess = SimpleNamespace(Popen=Forked)  # type: ignore[assignment]
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request: Any = json.loads(line)
        answer = (
            os.waitstatus_to_exitcode(os.waitpid(request, 0)[1])
            if isinstance(request, int)
            else start(**request)
        )
        print(answer, file=answers, flush=True)
