"""The training command as a user runs it: real processes, their files and their last words."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastalex.common.interrupts import Interrupted
from fastalex.data.pack import pack
from fastalex.training import checkpoints, train
from fastalex.training.weights import load_weights
from tests._commands import alive, end, run, start, wait_until, workers
from tests._runs import SCRIPT
from tests.faults._runs import changed, command

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

FILES = ["best.safetensors", "checkpoints", "metrics.jsonl", "model.safetensors", "run.json"]

# A rate at which a ReLU or a maximum that the last bit of a sum decides moves no loss by 1e-5.
SHORT = ["--threads", "1", "--image-size", "64", "--batch-size", "8", "--log-every", "1"]
SHORT += ["--lr", "0.0002"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes by colour: 8 images of each to train on and 3 to validate."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3)):
        for channel, name in enumerate(("blue", "green", "red")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 160, (80, 80, 3), np.uint8)
                pixels[..., 2 - channel] += 90
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def _train(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run([SCRIPT, *arguments], folder)


def _records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def _losses(folder: Path) -> list[float]:
    return [record["loss"] for record in _records(folder, "step")]


class Run:
    """A run that has ended well, and its folder."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.process = _train(folder.parent, *arguments, "--output", str(folder))
        assert self.process.returncode == 0, self.process.stderr
        self.folder = folder
        self.losses = _losses(folder)
        self.weights, self.metadata = load_weights(folder / "model.safetensors")


@pytest.fixture(scope="module")
def one(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("one") / "run"
    return Run(folder, "--gpus", "1", "--data", str(images), "--epochs", "2", *SHORT)


@pytest.fixture(scope="module")
def two(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("two") / "run"
    return Run(folder, "--gpus", "2", "--data", str(images), "--epochs", "2", *SHORT)


def _assert_same_training(first: Run, second: Run) -> None:
    """Equal but for the order in which float32 sums are taken, over a handful of steps."""
    assert second.losses == pytest.approx(first.losses, rel=1e-5)
    for name, weight in first.weights.items():
        torch.testing.assert_close(second.weights[name], weight, rtol=1e-3, atol=1e-5)
    keys = ("loss", "val_loss", "top1", "top5")
    for a, b in zip(_records(first.folder, "epoch"), _records(second.folder, "epoch"), strict=True):
        assert [b[k] for k in keys] == pytest.approx([a[k] for k in keys], rel=1e-5)


def test_two_towers_train_as_one_process_does(one: Run, two: Run) -> None:
    assert len(one.losses) == 6
    _assert_same_training(one, two)


@pytest.mark.slow
def test_two_replicas_train_as_one_process_does(images: Path, tmp_path: Path) -> None:
    arguments = ["--variant", "owt", "--data", str(images), "--max-steps", "3", *SHORT]
    single = Run(tmp_path / "one", "--gpus", "1", *arguments)
    replicas = Run(tmp_path / "two", "--gpus", "2", *arguments)
    assert "2 replicas with 4 images each" in replicas.process.stdout
    _assert_same_training(single, replicas)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["paper", "owt"])  # two towers, two replicas
def test_narrow_momentum_is_rounded_alike_in_two_processes(
    variant: str, images: Path, tmp_path: Path
) -> None:
    arguments = ["--variant", variant, "--data", str(images), "--max-steps", "3", *SHORT]
    arguments += ["--momentum-rule", "paper", "--momentum-dtype", "bf16", "--keep-checkpoints", "1"]
    runs = [Run(tmp_path / n, "--gpus", n, *arguments) for n in ("1", "2")]
    _assert_same_training(*runs)
    paths = [run.folder / "checkpoints" / "step-00000003.safetensors" for run in runs]
    (_, one), (_, two) = map(checkpoints.tensors, paths)
    for name, buffer in one.items():
        assert buffer.dtype == (torch.bfloat16 if buffer.dim() == 2 else torch.float32)
        assert two[name].dtype == buffer.dtype
        if buffer.dim() == 2:
            assert float((two[name] != buffer).double().mean()) < 0.02, name


def test_what_was_chosen_and_what_came_of_it_is_said(one: Run, two: Run, images: Path) -> None:
    said = two.process.stdout.splitlines()
    assert said[0].startswith("no GPU found: 2 CPU processes, gloo")
    assert "two towers, one per process" in said[1]
    assert said[2].startswith("initialisation: he")
    assert "3 classes, 24 training and 9 validation images, 64 px" in said[3]
    for epoch in (1, 2):
        assert sum(line.startswith(f"epoch {epoch}/2: loss") for line in said) == 1
    assert all("top-1" in line and "top-5" in line for line in said if line.startswith("epoch"))
    weights, metrics = two.folder / "model.safetensors", two.folder / "metrics.jsonl"
    assert said[-1] == f"weights: {weights}, metrics: {metrics}"
    for done in (one, two):
        # A slow run says how far it is, and nothing else.
        assert all(line.startswith("epoch ") for line in done.process.stderr.splitlines())
    assert one.process.stdout.startswith("no GPU found: one CPU process")


def test_the_folder_of_a_run_tells_what_it_was(one: Run, images: Path) -> None:
    names = sorted(path.name for path in one.folder.iterdir())
    assert names == FILES
    report = json.loads((one.folder / "run.json").read_text())
    assert report["status"] == "finished"
    assert report["arguments"]["data"] == str(images)
    assert report["settings"]["batch_size"] == 8
    assert report["seed"] == 0
    assert report["started"] <= report["ended"]
    assert set(report["versions"]) == {"python", "torch", "triton", "fastalex"}
    assert report["host"]
    steps = _records(one.folder, "step")
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert [record["epoch"] for record in steps] == [1, 1, 1, 2, 2, 2]
    assert all(record["images_per_s"] > 0 for record in steps)
    assert one.metadata["classes"] == ["blue", "green", "red"]
    assert one.metadata["epoch"] == 2
    assert one.metadata["image_size"] == 64
    assert one.metadata["top1"] == _records(one.folder, "epoch")[-1]["top1"]
    assert set(one.metadata["normalization"]) == {"mean", "std"}
    assert one.weights["features.0.weight"].shape == (32, 3, 11, 11)  # of the thin net


def _start(folder: Path, images: Path, *arguments: str) -> subprocess.Popen[str]:
    """A run of many epochs, in ``folder / "run"``."""
    common = ["--data", str(images), "--epochs", "1000", "--output", "run", *SHORT]
    return start([SCRIPT, *common, *arguments], folder)


def _wait_for_checkpoint(folder: Path) -> None:
    found = (folder / "checkpoints").glob
    wait_until(lambda: list(found("step-*.safetensors")), "an epoch is done")


@pytest.fixture
def two_training(images: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Two processes in the middle of a run, after its first epoch."""
    process = _start(tmp_path, images, "--gpus", "2")
    try:
        _wait_for_checkpoint(tmp_path / "run")
        yield process, workers(process.pid)
    finally:
        end(process)


@pytest.mark.slow
@linux
def test_a_killed_process_ends_the_run(
    two_training: tuple[subprocess.Popen[str], list[int]], tmp_path: Path
) -> None:
    process, pids = two_training
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    killed, lost = sorted(stderr.splitlines(), key=len)
    assert killed.startswith(f"train: error: rank 1 (process {pids[1]}) was killed by SIGKILL")
    assert lost.startswith("train: error: rank 0: lost the connection to rank 1 (host ")
    assert re.search(r"keeps model\.safetensors of epoch \d+ .*goes on after step \d+$", lost)
    assert not any(map(alive, pids))
    load_weights(tmp_path / "run" / "model.safetensors")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.slow
@linux
def test_no_process_outlives_a_killed_launcher(
    two_training: tuple[subprocess.Popen[str], list[int]], tmp_path: Path
) -> None:
    process, pids = two_training
    assert all(map(alive, pids))
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(alive, pids)), "all ended", seconds=30)
    load_weights(tmp_path / "run" / "model.safetensors")


@pytest.mark.slow
@linux
def test_ctrl_c_while_processes_start_is_quiet_too(images: Path, tmp_path: Path) -> None:
    process = _start(tmp_path, images, "--gpus", "2")
    try:
        wait_until(lambda: workers(process.pid), "a process started")
        pids = workers(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode == 130
    assert stderr.splitlines() == [
        "train: stopped by SIGINT before training started; run the same command again"
    ]
    assert not any(map(alive, pids))


def test_an_interrupt_in_the_start_of_a_thread_leaves_the_thread_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start, failures = threading._start_new_thread, []

    def start_and_interrupt(*arguments: Any) -> None:
        start(*arguments)
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(threading, "_start_new_thread", start_and_interrupt)
    monkeypatch.setattr(sys, "unraisablehook", failures.append)
    ran = threading.Event()
    with pytest.raises(Interrupted):
        threading.Thread(target=ran.set).start()
    assert ran.wait(10)
    assert not failures


@pytest.mark.slow
@pytest.mark.parametrize("gpus", ["1", "2"])
def test_a_loss_that_is_not_finite_ends_the_run(images: Path, tmp_path: Path, gpus: str) -> None:
    arguments = ["--gpus", gpus, "--variant", "owt", "--data", str(images), "--output", "run"]
    process = _train(tmp_path, *arguments, *SHORT, "--lr", "1e30")
    assert process.returncode == 1
    assert len(process.stderr.splitlines()) <= 2
    found = re.search(r"the loss is (nan|inf) at step (\d+) \(epoch 1\), on (.+?),", process.stderr)
    assert found is not None
    assert int(found[2]) <= 3
    assert Path(found[3]).is_file()
    assert "and 5 more samples" in process.stderr
    assert "no weights yet" in process.stderr
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_bug_in_one_process_shows_its_traceback_once(tmp_path: Path) -> None:
    script = changed(
        tmp_path,
        "def bug(self):\n"
        "    if self.parallel.is_main:\n"
        "        return run(self)\n"
        "    raise ZeroDivisionError('the bug')\n"
        "run = trainer.Trainer.run\n"
        "trainer.Trainer.run = bug\n",
    )
    process = run(command("ours", script=script), tmp_path)
    assert process.returncode == 1
    assert process.stderr.count("Traceback") == 1
    assert process.stderr.count("\nZeroDivisionError: the bug") == 1
    assert "train: error: rank 0: lost the connection to rank 1 (host " in process.stderr
    assert "run keeps metrics.jsonl, no weights yet" in process.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_image_that_one_tower_cannot_read_ends_both(
    images: Path, tmp_path: Path, rank: int
) -> None:
    """Half of the images are for the other one, which finds nothing wrong."""
    script = changed(
        tmp_path,
        "from fastalex.data import packed\n"
        "train_epoch = trainer.Trainer._train_epoch\n"
        "def damaged(self):\n"
        f"    if launch.rank() == {rank}:\n"
        "        packed.crc32 = lambda data: -1\n"
        "    train_epoch(self)\n"
        "trainer.Trainer._train_epoch = damaged\n",
    )
    pack(images, tmp_path / "set", 73, 1)
    process = run(command("ours", "--data", "set", script=script), tmp_path)
    assert process.returncode == 1
    lines = process.stderr.splitlines()
    (line,) = (line for line in lines if f"lost the connection to rank {rank} " not in line)
    assert line.startswith(f"train: error: rank {rank}: set/train/00000.npy: image ")
    assert "does not match its checksum; copy the set or pack it again" in line
    assert sum("run keeps metrics.jsonl, no weights yet" in line for line in lines) == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def _folder(root: Path, *images: str) -> Path:
    for name in images:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 70)).save(path)
    return root


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """The line that says why; asserts exit code 2 and that nothing was written."""
    before = sorted(folder.rglob("*"))
    try:
        code = train.main(arguments)
    except SystemExit as error:
        code = int(error.code or 0)
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("train: error: ")
    assert sorted(folder.rglob("*")) == before
    return said.err


@pytest.fixture
def folders(here: Path) -> Path:
    _folder(here / "good", "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png")
    _folder(here / "unknown", "train/a/1.png", "val/a/1.png", "val/extra/1.png")
    (here / "empty" / "train").mkdir(parents=True)
    (here / "empty" / "val").mkdir()
    (here / "old").mkdir()
    (here / "old" / "run.json").write_text("{}")
    return here


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--variant", "resnet"], "resnet"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "empty"], "empty"),
        (["--data", "unknown"], "extra"),
        (["--output", "old"], "--output old: run.json can't be read"),
        (["--output", "/proc/x"], "--output /proc/x: nothing can be written there"),
        (["--output", "old/run.json/x"], "--output old/run.json/x: nothing can be written there"),
        (["--output", "good"], "good: the folder is not empty"),
        (
            ["--data", "good", "--image-size", "2049"],
            "--image-size: expected a whole number from 1",
        ),
        (["--data", "good", "--image-size", "20"], "20: variant paper needs at least 36"),
        (["--epochs", "0"], "--epochs"),
        (["--batch-size", "x"], "'x'"),
        (["--lr", "nan"], "--lr"),
        (["--dropout", "1"], "--dropout"),
        (["--init", "zero"], "zero"),
        (["--seed", "-1"], "--seed"),
        (["--momentum-dtype", "bf16"], "bf16 needs --momentum-rule paper"),
        (["--momentum-dtype", "float16"], "'float16'"),
        (["surplus"], "surplus"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(
    folders: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], names: str
) -> None:
    assert names in _refused(arguments, capsys, folders)


def test_one_gpu_for_two_processes_is_refused_with_what_to_do(
    folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    line = _refused(["--gpus", "2"], capsys, folders)
    assert "--gpus 1" in line
    assert "CUDA_VISIBLE_DEVICES=" in line


def test_another_number_of_processes_than_torchrun_started_is_refused(
    folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--gpus 1 under a launcher" in _refused(["--gpus", "1"], capsys, folders)
