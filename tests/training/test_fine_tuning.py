"""--init-from, --freeze, --config, and training as a function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastalex.training
from fastalex import AlexNet
from fastalex.training import train
from fastalex.training.weights import load_model, load_weights, save_weights
from tests import _commands
from tests._runs import OPTIONS, SCRIPT, digest

SCALE = {"mean": [101.0, 102.0, 103.0], "std": [51.0, 52.0, 53.0]}
SHORT = ["--max-steps", "3"]


def _weights(path: Path, classes: list[str] | None = None, **changes: Any) -> dict[str, Any]:
    """Weights to begin with; the state dict."""
    net = AlexNet(len(classes or CLASSES), variant="owt")
    net.init_parameters("he", torch.Generator().manual_seed(7))
    metadata = {
        "variant": "owt", "num_classes": len(classes or CLASSES), "dropout": 0.5,
        "classes": classes or CLASSES, "image_size": 67, "normalization": SCALE, **changes,
    }  # fmt: skip
    save_weights(path, net.state_dict(), metadata)
    return net.state_dict()


CLASSES = [f"class {i}" for i in range(7)]


def _run(*arguments: str) -> int:
    options = [word for word in OPTIONS if word not in ("--variant", "paper")]
    return train.main([*options, *SHORT, *arguments])


def test_a_run_begins_with_weights_and_leaves_frozen_parts_alone(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = _weights(here / "w.safetensors")
    assert _run("--init-from", "w.safetensors", "--freeze", "features", "--output", "run") == 0
    out = capsys.readouterr().out
    assert "begins with: w.safetensors but for the last layer, which is drawn anew" in out
    assert "not trained: the convolutions" in out
    model, metadata = load_model(here / "run/model.safetensors")
    assert (metadata["variant"], metadata["normalization"]) == ("owt", SCALE)
    for name, tensor in model.state_dict().items():
        same = name in given and given[name].shape == tensor.shape
        assert (same and torch.equal(tensor, given[name])) == name.startswith("features"), name


def test_a_linear_probe_trains_the_last_layer_alone(here: Path) -> None:
    given = _weights(here / "w")
    assert _run("--init-from", "w", "--freeze", "hidden", "--output", "run") == 0
    found, _ = load_weights(here / "run/model.safetensors")
    changed = {n for n, t in found.items() if not torch.equal(t, given[n])}
    assert changed == {"classifier.6.weight", "classifier.6.bias"}
    assert train.main(["--config", "run/run.json", "--output", "again"]) == 0
    assert digest(here / "again") == digest(here / "run")


@pytest.mark.slow
def test_a_finished_run_is_trained_on_without_the_file(here: Path) -> None:
    _weights(here / "w")
    options = [*OPTIONS[:4], "--log-every", "1", "--threads", "1", "--keep-checkpoints", "2"]
    options += ["--lr", "0.002", "--init-from", "w", "--freeze", "features", "--lr-drop", "1"]
    assert train.main([*options, "--epochs", "2", "--output", "whole"]) == 0
    assert train.main([*options, "--epochs", "1", "--output", "run"]) == 0
    (here / "w").unlink()
    assert train.main(["--resume", "run", "--epochs", "2"]) == 0
    assert digest(here / "run") == digest(here / "whole")


@pytest.mark.slow
def test_two_towers_leave_the_same_parts_alone(tmp_path: Path) -> None:
    command = [SCRIPT, *OPTIONS, *SHORT, "--freeze", "features"]
    found = []
    for gpus in ("1", "2"):
        process = _commands.run([*command, "--gpus", gpus, "--output", gpus], tmp_path)
        assert process.returncode == 0, process.stderr
        found.append(load_weights(tmp_path / gpus / "model.safetensors")[0])
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-6)
        if name.startswith("features"):
            assert torch.equal(found[1][name], tensor), name


def test_wrong_weights_are_a_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _weights(here / "w")
    _weights(here / "other", variant="paper")
    (here / "text").write_text("none")
    for arguments, said in (
        (["--init-from", "none"], "no such weights file"),
        (["--init-from", "text"], "not a safetensors file"),
        (["--init-from", "w", "--variant", "caffe"], "it is of variant owt, leave out --variant"),
        (["--init-from", "other"], "does not fit variant paper"),
        (["--normalization", "init-from"], "needs --init-from"),
        (["--freeze", "all"], "--freeze"),
    ):
        try:
            code = _run(*arguments, "--output", "run")
        except SystemExit as stop:
            code = int(str(stop.code))
        assert code == 2, arguments
        err = capsys.readouterr().err
        assert err.count("\n") == 1, err
        assert said in err, err
    assert not (here / "run").exists()


def test_config_takes_a_run_s_settings(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*OPTIONS, *SHORT, "--lr", "0.003", "--lr-drop", "0.4"]
    assert train.main([*command, "--without", "lrn", "--output", "one"]) == 0
    assert train.main(["--config", "one/run.json", "--output", "two"]) == 0
    assert digest(here / "one") == digest(here / "two")
    assert train.main(["--config", "one/run.json", "--schedule", "plateau", "--lr", "0.0001",
                       "--output", "three"]) == 0  # fmt: skip
    one, two, three = (
        json.loads((here / run / "run.json").read_text())["settings"]
        for run in ("one", "two", "three")
    )
    assert two == one
    assert {k for k in one if one[k] != three[k]} == {"schedule", "lr", "lr_drop"}
    (here / "list").write_text("[]")
    (here / "unknown").write_text('{"settings": {"depth": 9}}')
    (here / "wrong").write_text('{"settings": {"epochs": "many"}}')
    capsys.readouterr()
    for name in ("none", ".", "list", "unknown", "wrong"):
        with pytest.raises(SystemExit) as stop:
            train.main(["--config", name, "--output", "four"])
        err = capsys.readouterr().err
        assert (stop.value.code, err.count("\n")) == (2, 1), (name, err)
    assert not (here / "four").exists()


def test_fit_trains_what_the_command_trains(here: Path) -> None:
    assert train.main([*OPTIONS, *SHORT, "--output", "command"]) == 0
    settings = json.loads((here / "command/run.json").read_text())["arguments"]
    given = {name: value for name, value in settings.items() if value not in (None, False, [])}
    found = fastalex.training.fit(**{**given, "output": "function"})
    assert found == Path("function")
    assert digest(here / "function") == digest(here / "command")
    assert fastalex.training.fit(resume=found) == found
    for options, said in (({"epochs": 0}, "epochs"), ({"depth": 9}, "--depth"),
                          ({"init_from": "none"}, "no such weights file")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            fastalex.training.fit(**options, output="other")
    assert not (here / "other").exists()


@pytest.mark.slow
def test_fit_trains_two_towers_from_a_plain_script(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(
        "from fastalex.training import fit\n"
        "print(fit(gpus=2, max_steps=1, image_size=64, batch_size=2, threads=1))\n"
        "try:\n"
        "    fit(gpus=2, variant='owt', batch_size=3)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    process = _commands.run(["plain.py"], tmp_path)
    said = process.stdout.splitlines()
    assert "two towers, one per process" in said[1]
    assert said[-2] == "runs/paper-0-001"
    assert said[-1].startswith("runs/owt-0-001: training ended with code 2")
    assert [line for line in process.stderr.splitlines() if line.startswith("train:")] == [
        "train: error: --batch-size 3: 2 processes share each batch, name a multiple of 2"
    ]
    assert (tmp_path / "runs" / "paper-0-001" / "model.safetensors").is_file()
    assert not (tmp_path / "runs" / "owt-0-001").exists()
