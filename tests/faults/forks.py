"""Training runs in forks of one process that has imported everything, so that each takes a moment.

    python tests/faults/forks.py < COMMANDS > RESULTS

Reads lines of JSON, the arguments of a run and the state for ``inject.c``, and answers each with
the exit code and what was printed. Runs have the small net of ``_small_train``; the processes of
one with several are forks, too.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import struct
import sys
import tempfile
import traceback
from typing import Any

import torch

from fastalex.training import train
from tests import _small_train


def run(arguments: list[str], state: list[int]) -> dict[str, Any]:
    with open(os.environ["FAULT_STATE"], "rb+") as file:
        file.write(struct.pack("4q", *state))
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.setsid()  # a killed group is this one
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
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
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    with open(os.environ["FAULT_STATE"], "rb") as file:
        count = struct.unpack("4q", file.read(32))[0]
    return {"code": code, "out": texts[0], "err": texts[1], "count": count, "group": child}


if __name__ == "__main__":
    torch.set_num_threads(1)
    _small_train.shrink()
    forking = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: forking  # type: ignore[assignment]
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), file=answers, flush=True)
