"""Parts of this suite that need a process of their own, run beside the rest of it.

Whether a kernel is interpreted is decided when it is imported, and ``ttsem`` takes over the whole
process. So both run as pytest in a child process, several at a time, started as soon as tests are
collected; a test of test_suites waits for each.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fastalex_kernels.common.launch import interpreted

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# An interpreter that has ttsem, where it is not this one.
TTSEM_PYTHON = os.environ.get("FASTALEX_TTSEM_PYTHON", sys.executable)


@dataclass(frozen=True)
class Suite:
    """Tests for one child process: ``python *options -m *runner ARGUMENTS *tests``."""

    name: str
    tests: tuple[str, ...]
    python: str = sys.executable
    runner: tuple[str, ...] = ("pytest",)
    interpret: bool = False

    def obstacle(self) -> str:
        """Why it can't run here, or an empty string."""
        if interpreted():
            return "this process interprets already"
        return missing_ttsem() if self.runner[0].startswith("ttsem") else ""


def interpreted_suites() -> list[Suite]:
    """One for each file of the folder ``interpreted``, under TRITON_INTERPRET=1."""
    files = sorted((HERE / "interpreted").glob("test_*.py"))
    return [Suite(f"interpreted/{f.stem}", (str(f),), interpret=True) for f in files]


def sanitized_suites() -> list[Suite]:
    """What ttsem runs of test_gpu: real tiles, bfloat16, TF32, races and uninitialised reads.

    And the files of the folder ``sanitized``: what it must find, and whole training steps.
    """
    parts = {
        "bfloat16": ["test_bfloat16"],
        "others": [
            "test_tf32",
            "test_same_bits_again",
            "test_dropout_as_on_a_cpu",
            "test_augment_to_blocks",
            "test_cross_entropy",
            "test_fused_update",
            "test_masked_gradients",
        ],
    }
    named = {
        name: tuple(f"{HERE}/test_gpu.py::{t}" for t in tests) for name, tests in parts.items()
    }
    named |= {f.stem: (str(f),) for f in sorted((HERE / "sanitized").glob("test_*.py"))}
    runner = ("ttsem.sanitize", "pytest")
    return [Suite(f"ttsem/{name}", tests, TTSEM_PYTHON, runner) for name, tests in named.items()]


@functools.cache
def missing_ttsem() -> str:
    """Why ttsem can't run, or an empty string."""
    if sys.executable == TTSEM_PYTHON:
        found = importlib.util.find_spec("ttsem") is not None
    else:
        found = (
            subprocess.run([TTSEM_PYTHON, "-c", "import ttsem"], capture_output=True).returncode
            == 0
        )
    return "" if found else "ttsem is not installed (pip install --no-deps ttsem==0.1.0)"


def ttsem_cache() -> str:
    """A folder for ttsem beside Triton's cache: nobody else can read the code that it leaves."""
    cache = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    return str(cache.with_name(f"{cache.name}-ttsem"))


class Children:
    """Runs suites in child processes, as many at once as there are processors."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1)
        self._running: list[subprocess.Popen[str]] = []
        self._results: dict[str, Future[tuple[int, str]]] = {}

    def start(self, suites: Iterable[Suite]) -> None:
        for suite in suites:
            self._results[suite.name] = self._pool.submit(self._run, suite)

    def result(self, suite: Suite) -> tuple[int, str]:
        """(exit status, output) of a suite, which is started if it is not under way."""
        if suite.name not in self._results:
            self.start([suite])
        return self._results[suite.name].result()

    def summaries(self) -> dict[str, str]:
        """The last line of each suite that ended."""
        ended = {name: f for name, f in self._results.items() if f.done() and not f.cancelled()}
        return {name: f.result()[1].strip().splitlines()[-1] for name, f in ended.items()}

    def stop(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._running:
            if process.poll() is None:
                process.kill()

    def _run(self, suite: Suite) -> tuple[int, str]:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if suite.interpret:
            environment["TRITON_INTERPRET"] = "1"
        options = ["-q", "-o", "addopts=-ra", "-p", "no:cacheprovider", "--tb=short"]
        if suite.runner[0].startswith("ttsem"):
            environment["TRITON_CACHE_DIR"] = ttsem_cache()
        command = [suite.python, "-m", *suite.runner, *options, *suite.tests]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._running.append(process)
        output, _ = process.communicate()
        return process.returncode, output
