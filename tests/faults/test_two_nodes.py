"""Two machines by torchrun, here as two launchers of one: what each of them alone knows is said."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from tests._commands import descendants, end, start, wait_until
from tests.faults._runs import changed, linux, node, trained

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("slow_steps"), linux]


@contextmanager
def _nodes(
    folders: list[Path], *options: str, **about: str
) -> Iterator[list[subprocess.Popen[str]]]:
    processes = [
        start(node(number, "127.0.0.1", *options, **about), folder)
        for number, folder in enumerate(folders)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            end(process)


def _errors(process: subprocess.Popen[str]) -> list[str]:
    _, stderr = process.communicate(timeout=60)
    return [line for line in stderr.splitlines() if line.startswith("train:")]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """What each machine sees as the folder to run in."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    return folders


def test_a_machine_without_the_checkpoint_says_so(folders: list[Path]) -> None:
    keep = ("--keep-checkpoints", "2")
    with _nodes(folders, *keep, "--epochs", "1") as processes:
        assert list(map(_errors, processes)) == [[], []]
    assert sorted(folder.name for folder in folders[1].iterdir()) == []
    with _nodes(folders, *keep, "--epochs", "2") as processes:
        first, second = map(_errors, processes)
        assert [process.returncode for process in processes] == [1, 1]  # torchrun's
    assert first == ["train: error: rank 1 can't take part, it says why"]
    assert len(second) == 1
    assert "train: error: rank 1: run/checkpoints/step-00000005.safetensors: not on" in second[0]
    assert json.loads((folders[0] / "run" / "run.json").read_text())["status"] == "failed"


def test_a_machine_without_the_images_says_so(folders: list[Path]) -> None:
    for part in ("train", "val"):
        (folders[0] / "images" / part / "red").mkdir(parents=True)
        for i in range(8):
            image = Image.new("RGB", (80, 80), (200, i, 0))
            image.save(folders[0] / "images" / part / "red" / f"{i}.png")
    with _nodes(folders, "--epochs", "1", "--data", "images") as processes:
        first, second = map(_errors, processes)
    assert first == ["train: error: rank 1 can't take part, it says why"]
    assert len(second) == 1
    assert second[0].startswith("train: error: rank 1: images: no such folder")


def test_a_killed_machine_is_named(folders: list[Path]) -> None:
    with _nodes([folders[0], folders[0]], "--epochs", "5000") as processes:
        wait_until(lambda: trained(folders[0], 6), "trained")
        for pid in descendants(processes[1].pid):
            os.kill(pid, signal.SIGKILL)
        (line,) = _errors(processes[0])
    print(line)
    assert re.search(r"rank 0: lost the connection to rank 1 \(host .+\), at step \d+; ", line)
    assert re.search(r"goes on after step \d+$", line)


def test_rank_0_prepares_while_no_collective_waits(folders: list[Path]) -> None:
    script = changed(
        folders[0],
        "import time\n"
        "launch._SAY = 1.0\n"
        "prepare = train.prepare\n"
        "def slow(options):\n"
        "    time.sleep(6)\n"
        "    return prepare(options)\n"
        "train.prepare = slow\n",
    )
    with _nodes([folders[0], folders[0]], "--max-steps", "2", script=script) as processes:
        first, second = map(_errors, processes)
        assert [process.returncode for process in processes] == [0, 0]
    assert first == []
    assert len(second) >= 2
    for line in second:
        assert re.fullmatch(
            r"train: rank 1: waits for rank 0, which prepares the data, for \d+ s now", line
        )
