"""Real processes for tests: start one, watch it, and know its children."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")


def environment() -> dict[str, str]:
    """This process's, so that Python finds the checkout, and no launcher's or GPU's is left."""
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**kept, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    """``python *arguments`` in ``folder``, as the leader of its own process group."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """``python *arguments`` in ``folder``, to its end."""
    process = start(arguments, folder)
    try:
        stdout, stderr = process.communicate(timeout=300)
    finally:
        end(process)
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


class _Process(Protocol):
    def poll(self) -> int | None: ...

    def kill(self) -> None: ...

    def wait(self) -> int | None: ...


def end(process: _Process) -> None:
    """Kill ``process`` if it still runs."""
    if process.poll() is None:
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 120) -> None:
    """Wait until ``condition()`` is true; fail when that takes too long, saying ``what`` it was."""
    last = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < last, f"after {seconds} s: not {what}"
        time.sleep(0.02)


def workers(parent: int) -> list[int]:
    """The training processes that ``parent``, a launcher, started, by rank (Linux)."""
    return [pid for pid, above, command in _processes() if above == parent and ".py" in command]


def descendants(pid: int) -> list[int]:
    """``pid`` and every process below it (Linux)."""
    found, processes = [pid], _processes()
    for one in found:
        found += [child for child, above, _ in processes if above == one]
    return found


def _processes() -> list[tuple[int, int, str]]:
    """Of each process its number, its parent's and its command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
            command = (entry / "cmdline").read_text()
        except OSError:  # it has ended meanwhile
            continue
        found.append((int(entry.name), int(stat.rpartition(")")[2].split()[1]), command))
    return sorted(found)


def alive(pid: int) -> bool:
    """Whether ``pid`` runs; one that has ended and is still to be collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
