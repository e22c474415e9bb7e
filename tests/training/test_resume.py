"""A run that was stopped goes on as if it never had been."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
import torch

from fastalex.data import datasets
from fastalex.distributed import launch
from fastalex.training import train, trainer
from fastalex.training.checkpoints import find
from fastalex.training.metrics import MetricsLog
from fastalex.training.run_folder import RunFolder
from fastalex.training.weights import load_weights
from tests._runs import OPTIONS, STEPS, before_step, checkpoints, contents, digest, records, steps


def _interrupt() -> None:
    raise launch.Interrupted(signal.SIGINT)


def _train(*arguments: str) -> int:
    return train.main([*OPTIONS, *arguments])


@pytest.fixture
def stopped(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The folder of a run that was stopped in step 8, after the checkpoints of steps 5 and 6."""
    with monkeypatch.context() as patch:
        before_step(8, patch, _interrupt)
        assert _train("--output", "run") == 130
    assert "after step 6; run the same command again to go on" in capsys.readouterr().err
    assert checkpoints(here / "run") == [5, 6]
    return "run"


@pytest.mark.parametrize(
    ("step", "options"),
    [
        pytest.param(4, ["--precision", "bf16"], marks=pytest.mark.slow),
        pytest.param(
            4,
            ["--precision", "fp16", "--variant", "owt", "--batch-size", "2", "--max-steps", "5"],
            marks=pytest.mark.slow,
        ),
        # At a rate that changes no weight the second validation is no better, and drops it.
        pytest.param(
            13, ["--recipe", "paper", "--lr", "1e-30", "--lr-patience", "1"], marks=pytest.mark.slow
        ),
        (7, ["--momentum-rule", "paper", "--momentum-dtype", "bf16"]),
        (7, ["--lr-drop", "0.5", "--warmup", "0.3", "--augmentation", "full"]),
    ],
)
def test_every_part_of_the_state_is_kept(
    here: Path, monkeypatch: pytest.MonkeyPatch, step: int, options: list[str]
) -> None:
    assert _train(*options, "--output", "whole") == 0
    with monkeypatch.context() as patch:
        before_step(step, patch, _interrupt)
        assert _train(*options, "--output", "run") == 130
    assert train.main(["--resume", "run"]) == 0
    assert digest(here / "run") == digest(here / "whole")
    assert records(here / "run") == records(here / "whole")
    losses = [record["loss"] for record in records(here / "run")]
    assert len(set(losses)) > 3  # it does train
    if "--recipe" in options:
        rates = [record["lr"] for record in records(here / "run") if record["kind"] == "step"]
        assert rates[:10] == [1e-30] * 10
        assert rates[10:] == pytest.approx([1e-31] * 5)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    stopped: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = here / "run" / "checkpoints" / "step-00000006.safetensors"
    data = newest.read_bytes()
    newest.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert train.main(["--resume", stopped]) == 0
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    assert "step-00000006.safetensors: damaged" in said.err
    assert "resumed: after step 5" in said.out
    assert steps(here / "run") == list(range(1, STEPS + 1))


@pytest.mark.parametrize("place", [b'"batch\\\\": 1', b'"step\\\\": 6'])
def test_a_changed_number_in_the_state_is_noticed(
    stopped: str, here: Path, capsys: pytest.CaptureFixture[str], place: bytes
) -> None:
    newest = here / "run" / "checkpoints" / "step-00000006.safetensors"
    data = newest.read_bytes()
    assert data.count(place.replace(b"\\\\", b"\\")) == 1
    found = place.replace(b"\\\\", b"\\")
    newest.write_bytes(data.replace(found, found[:-1] + b"3"))
    start, damaged = find(Path(stopped))
    assert start.step == 5
    assert "damaged, its metadata" in damaged[0]


def test_without_a_whole_checkpoint_nothing_is_touched(
    stopped: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (here / "run" / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    before = contents(here)
    assert train.main(["--resume", stopped]) == 2
    said = capsys.readouterr().err
    assert "no whole checkpoint is left" in said
    assert len(said.splitlines()) == 1
    assert contents(here) == before


@pytest.mark.slow
def test_before_the_first_checkpoint_it_begins_again(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train("--output", "whole") == 0
    with monkeypatch.context() as patch:
        before_step(2, patch, _interrupt)
        assert _train("--output", "run") == 130
    assert train.main(["--resume", "run"]) == 0
    assert "from the first step again" in capsys.readouterr().out
    assert digest(here / "run") == digest(here / "whole")
    assert records(here / "run") == records(here / "whole")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--resume", "nowhere"], "nowhere: no run in it"),
        (["--resume", "run", "--lr", "1"], "leave out --lr"),
        (["--resume", "run", "--seed", "3", "--recipe", "paper"], "leave out --recipe, --seed"),
        (["--resume", "run", "--output", "x"], "leave out --output"),
        (["--resume", "run", "--data", "nowhere"], "nowhere"),
    ],
)
def test_what_a_resumed_run_cannot_take_is_refused(
    stopped: str,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    names: str,
) -> None:
    before = contents(here)
    assert train.main(arguments) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert names in said
    assert contents(here) == before


def test_other_images_are_refused(
    stopped: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "TRAIN_COUNT", 30)
    before = contents(here)
    assert train.main(["--resume", stopped]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "training images: " in said
    assert "4 images before, 3 now" in said
    assert contents(here) == before
    assert train.main(["--resume", stopped, "--allow-changed-images"]) == 0
    assert "warning: training images: " in capsys.readouterr().err
    found = records(here / "run")
    # Six steps with the 40 images, one of the five batches of epoch 2; then four batches an epoch.
    assert [r["step"] for r in found if r["kind"] == "step"] == list(range(1, 14))
    assert [r["step"] for r in found if r["kind"] == "epoch"] == [5, 9, 13]


@pytest.mark.slow
@pytest.mark.parametrize("minutes", ["1e-9", "10"])
def test_checkpoints_that_nobody_keeps_go_with_the_end_of_the_run(
    here: Path, monkeypatch: pytest.MonkeyPatch, minutes: str
) -> None:
    command = ["--image-size", "64", "--batch-size", "8", "--threads", "1", "--epochs", "2"]
    command += ["--checkpoint-minutes", minutes, "--output", "run"]
    with monkeypatch.context() as patch:
        before_step(8, patch, _interrupt)
        assert train.main(command) == 130
    assert checkpoints(here / "run") == ([7] if minutes == "1e-9" else [])
    assert train.main(command) == 0
    assert not (here / "run" / "checkpoints").exists()
    assert steps(here / "run") == [10]


@pytest.mark.parametrize("linked", [True, False])
def test_the_best_weights_outlast_worse_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    if not linked:
        monkeypatch.setattr("fastalex.training.run_folder.os.link", refuse)
    folder = RunFolder(tmp_path)
    for epoch, best in ((1, True), (2, False), (3, True), (4, False)):
        trainer.save_weights(folder.weights, {"w": torch.tensor([epoch])}, {"epoch": epoch})
        if best:
            folder.keep_best()
        assert load_weights(folder.weights)[0]["w"].item() == epoch
    assert load_weights(folder.best)[0]["w"].item() == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_records_behind_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append({"step": 1})
    length = log.length
    log.append({"step": 2})
    log.close()
    log = MetricsLog(path, length)
    log.append({"step": 2, "again": True})
    log.close()
    assert path.read_text().splitlines() == ['{"step": 1}', '{"step": 2, "again": true}']
    log = MetricsLog(path, 1000)
    assert log.missing == 1000 - path.stat().st_size
    log.close()


def test_a_record_that_does_not_fit_leaves_no_part_of_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append({"step": 1})
    real, room = os.write, [5, 0]

    def write(file: int, data: bytes) -> int:
        if room and not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data[: room.pop(0)] if room else data[:3])

    monkeypatch.setattr("fastalex.training.metrics.os.write", write)
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'$"):
        log.append({"step": 2})
    room.clear()  # there is room again, three bytes at a time
    log.append({"step": 3})
    log.close()
    assert path.read_text().splitlines() == ['{"step": 1}', '{"step": 3}']
