"""The same command, given again, goes on with its run; another one is refused in one line."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from fastalex.common import interrupts
from fastalex.training import train, trainer
from fastalex.training.run_folder import RunFolder
from tests._runs import (
    OPTIONS,
    STEPS,
    before_step,
    checkpoints,
    contents,
    digest,
    records,
    steps,
    terminate,
)


def _train(*arguments: str) -> int:
    return train.main([*OPTIONS, *arguments])


@pytest.fixture
def whole(here: Path) -> str:
    """The weights' digest of a run that nothing stopped."""
    assert _train("--output", "whole") == 0
    return digest(here / "whole")


def _stop(step: int, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    with monkeypatch.context() as patch:
        before_step(step, patch, terminate)
        assert _train("--output", "run", *arguments) == 75


def test_a_signal_saves_and_the_same_command_goes_on(
    here: Path, whole: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _stop(8, monkeypatch)
    assert capsys.readouterr().err.splitlines() == [
        "train: stopped by SIGTERM after step 8; run the same command again to go on"
    ]
    assert json.loads((here / "run" / "run.json").read_text())["status"] == "interrupted"
    assert _train("--output", "run") == 0
    said = capsys.readouterr()
    assert "resumed: after step 8" in said.out
    assert said.err == ""
    assert digest(here / "run") == whole
    assert records(here / "run") == records(here / "whole")
    assert sorted(contents(here / "run")) == [
        here / "run" / path.relative_to(here / "whole") for path in sorted(contents(here / "whole"))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--max-steps", "13"]])
def test_a_signal_in_the_validation_leaves_the_validation_for_later(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
) -> None:
    assert _train("--output", "whole", *options) == 0
    real = trainer.evaluate
    epochs = []

    def evaluate(*arguments: Any) -> Any:
        epochs.append(arguments)
        if len(epochs) == 3:  # the last one
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", evaluate)
        assert _train("--output", "run", *options) == 75
    last = 13 if options else STEPS
    assert f"after step {last};" in capsys.readouterr().err
    assert [r["step"] for r in records(here / "run") if r["kind"] == "epoch"] == [5, 10]
    assert _train("--output", "run", *options) == 0
    assert digest(here / "run") == digest(here / "whole")
    assert records(here / "run") == records(here / "whole")


def test_a_second_signal_ends_the_run_at_once(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(interrupts, "_ONE_REQUEST", 0.0)

    def train_step(self: trainer.Trainer, batch: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("went on")

    monkeypatch.setattr(trainer.Trainer, "_train_step", train_step)
    assert _train("--output", "run") == 75
    assert "stopped by SIGTERM before its first checkpoint" in capsys.readouterr().err
    assert json.loads((here / "run" / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_a_checkpoint_is_due_by_the_clock_too(here: Path) -> None:
    arguments = ["--checkpoint-every", "1000", "--checkpoint-minutes", "1e-9"]
    assert _train("--output", "run", "--keep-checkpoints", "99", *arguments) == 0
    assert checkpoints(here / "run") == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("first", "again", "names"),
    [
        ([], ["--lr", "1"], ["--lr 0.002 and not --lr 1.0"]),
        ([], ["--seed", "3", "--init", "published"], ["--seed 0 and not --seed 3", "--init he"]),
        pytest.param(
            ["--dropout", "0"], [], ["--dropout 0.0 and not --dropout 0.5"], marks=pytest.mark.slow
        ),
        pytest.param(
            ["--recipe", "caffe"],
            [],
            ["--recipe caffe and not no --recipe"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--without", "lrn"],
            [],
            ["--variant paper-without-lrn and not --variant paper"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--momentum-rule", "paper"],
            ["--momentum-rule", "paper", "--momentum-dtype", "bf16"],
            ["--momentum-dtype float32 and not --momentum-dtype bf16"],
            marks=pytest.mark.slow,
        ),
        ([], ["--epochs", "4"], ["--epochs 3 and not --epochs 4; it is not finished yet"]),
        pytest.param([], ["--data", "x"], ["no --data and not --data x"], marks=pytest.mark.slow),
    ],
)
def test_other_settings_are_refused_with_both_values(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    first: list[str],
    again: list[str],
    names: list[str],
) -> None:
    _stop(2, monkeypatch, *first)
    before = contents(here)
    capsys.readouterr()
    assert _train("--output", "run", *again) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert said.startswith("train: error: --output run: the run has ")
    assert all(name in said for name in names)
    assert contents(here) == before


def test_what_changes_no_weight_may_differ_and_a_default_may_be_spelt_out(
    here: Path, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stop(8, monkeypatch)
    given = ["--workers", "0", "--seed", "0", "--gpus", "1", "--keep-checkpoints", "1"]
    assert _train("--output", "run", *given) == 0
    assert digest(here / "run") == whole
    assert checkpoints(here / "run") == [STEPS]


def test_a_finished_run_is_finished_and_more_epochs_train_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train("--output", "run") == 0
    before = contents(here)
    capsys.readouterr()
    for arguments in ([*OPTIONS, "--output", "run"], ["--resume", "run"]):
        assert train.main(arguments) == 0
        assert "run is finished: all of its 15 steps are done" in capsys.readouterr().out
    for arguments in (
        [*OPTIONS, "--output", "run", "--lr", "0.1"],
        ["--resume", "run", "--lr", "0.1"],
        ["--resume", "run", "--epochs", "2"],
        ["--resume", "run", "--epochs", "5", "--momentum", "0.5"],
    ):
        assert train.main(arguments) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        assert arguments[-2] in said
    assert contents(here) == before
    shutil.copytree("run", "other")
    assert train.main(["--resume", "other", "--epochs", "4"]) == 0
    longer = [*OPTIONS, "--epochs", "4", "--output", "run"]
    with monkeypatch.context() as patch:
        before_step(17, patch, terminate)
        assert train.main(longer) == 75
    capsys.readouterr()
    assert train.main(longer) == 0
    assert "resumed: after step 17" in capsys.readouterr().out
    assert steps(here / "run") == list(range(1, 21))
    assert digest(here / "run") == digest(here / "other")
    assert train.main(longer) == 0
    assert "finished: all of its 20 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_older_checkpoints_that_a_kill_left_go(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("--output", "run", "--keep-checkpoints", "1")
    _stop(8, monkeypatch, *command[2:])
    for step in (8, 15):
        (newest,) = (here / "run" / "checkpoints").iterdir()
        assert newest.name == f"step-{step:08d}.safetensors"
        shutil.copy(newest, newest.with_name("step-00000004.safetensors"))
        assert _train(*command) == 0
    assert checkpoints(here / "run") == [15]


@pytest.mark.slow
def test_a_finished_run_without_checkpoints_stays_finished(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("--output", "run", "--keep-checkpoints", "0")
    assert _train(*command) == 0
    before = digest(here / "run")
    assert _train(*command) == 0
    assert "is finished" in capsys.readouterr().out
    assert digest(here / "run") == before
    assert _train(*command, "--epochs", "4") == 2
    assert "it kept no checkpoint" in capsys.readouterr().err


def test_a_run_of_an_older_version_goes_on_and_says_what_is_new(
    here: Path, whole: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _stop(8, monkeypatch)
    path = here / "run" / "run.json"
    report = json.loads(path.read_text())
    del report["settings"]["checkpoint_minutes"]
    path.write_text(json.dumps({**report, "settings": {**report["settings"], "warp": 9}}))
    capsys.readouterr()
    for command in (["--resume", "run"], [*OPTIONS, "--output", "run"]):
        assert train.main(command) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        assert "does not know: warp" in said
    path.write_text(json.dumps(report))
    assert _train("--output", "run") == 0
    said = capsys.readouterr().out
    assert "an older version of fastalex; new here: --checkpoint-minutes 10.0" in said
    assert digest(here / "run") == whole


@pytest.mark.slow
def test_torchruns_second_attempt_goes_on_in_the_first_ones_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("TORCHELASTIC_RUN_ID", "job")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("fastalex.distributed.launch.greet_launcher", lambda: None)
    with monkeypatch.context() as patch:
        before_step(8, patch, terminate)
        assert _train() == 75
    (first,) = (here / "runs").iterdir()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another job")
    assert _train("--max-steps", "1") == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    capsys.readouterr()
    assert _train() == 0
    assert f"resumed: after step 8, from {first.relative_to(here)}" in capsys.readouterr().out
    assert steps(first) == list(range(1, STEPS + 1))
    assert len(list((here / "runs").iterdir())) == 2


@pytest.mark.slow
def test_moved_images_are_refused_in_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    for part in ("train", "val"):
        for i in range(16):
            path = here / "images" / part / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (70, 70), (i * 16, 0, 0)).save(path)
    _stop(2, monkeypatch, "--data", "images")
    capsys.readouterr()
    moved = here / "images" / "train" / "b" / "0.png"
    (here / "images" / "train" / "a" / "0.png").rename(moved)
    moved.with_name("1.png").rename(here / "images" / "train" / "a" / "1.png")  # same counts
    command = ("--output", "run", "--data", "images")
    assert _train(*command) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "a: other names or sizes of files; b: other names or sizes of files" in said
    assert _train(*command, "--allow-changed-images") == 0


def test_a_folder_taken_away_in_training_is_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before_step(7, monkeypatch, lambda: shutil.rmtree("run"))
    assert _train("--output", "run") == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "No such file or directory; run is gone" in said
    assert not (here / "run").exists()


def test_nothing_of_a_full_disk_hides_the_reason(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From step 3 on nothing can be written, run.json neither."""

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    before_step(4, monkeypatch, lambda: monkeypatch.setattr("fastalex.common.files.os.fsync", full))
    assert _train("--output", "run") == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "No space left on device" in said
    assert not [path for path in contents(here) if path.name.startswith(".")]


@pytest.mark.slow
def test_who_can_not_have_the_folder_touches_nothing_in_it(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _stop(2, monkeypatch)
    monkeypatch.setattr("fastalex.training.metrics._LOCK_SECONDS", 0.1)
    owner = RunFolder.claim(here / "run")
    (here / "run" / ".run.json.1.tmp").write_text("the owner is writing it")
    before = contents(here)
    capsys.readouterr()
    for command in ([*OPTIONS, "--output", "run"], ["--resume", "run"]):
        assert train.main(command) == 2
        assert "another process trains in this folder" in capsys.readouterr().err
    assert contents(here) == before
    owner.release()
    assert _train("--output", "run") == 0
