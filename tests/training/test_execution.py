"""How a run chooses to execute its steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastalex.distributed import world
from fastalex.distributed.world import World
from fastalex.training import train
from fastalex.training.config import Settings
from fastalex.training.options import parse_arguments
from fastalex.training.weights import read_metadata
from tests._runs import OPTIONS, before_step, terminate


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [
        ([], "cpu", (True, False)),
        ([], "cuda", (True, True)),
        (["--precision", "fp16"], "cuda", (False, False)),
        (["--no-fused-update"], "cuda", (False, False)),
        (["--no-cuda-graph"], "cuda", (True, False)),
        (["--no-fused-update"], "cpu", (False, False)),
    ],
)
def test_defaults_follow_the_device(
    options: list[str], device: str, expected: tuple[bool, bool]
) -> None:
    settings = Settings.choose(parse_arguments(options), device)
    assert (settings.fused_update, settings.cuda_graph) == expected


@pytest.mark.parametrize(
    ("options", "bf16", "expected"),
    [
        ([], False, "float32"),
        ([], True, "bf16"),
        (["--precision", "auto"], True, "bf16"),
        (["--precision", "float32"], True, "float32"),
        (["--precision", "tf32"], True, "tf32"),
    ],
)
def test_precision_follows_the_gpu_unless_it_is_given(
    options: list[str], bf16: bool, expected: str
) -> None:
    assert Settings.choose(parse_arguments(options), "cuda", bf16).precision == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True)])
def test_a_gpu_has_bf16_from_compute_capability_8(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert world.has_bf16(World("cuda", 1, 1, 1)) is expected
    assert not world.has_bf16(World("cpu", 1, 1, 1))


def test_tf32_holds_for_the_run_alone(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before, seen = [each.fp32_precision for each in settings], []
    before_step(1, monkeypatch, lambda: seen.append([each.fp32_precision for each in settings]))
    for precision, expected in (("tf32", ["tf32"] * 2), ("float32", before)):
        command = [*OPTIONS, "--max-steps", "1", "--precision", precision, "--output", precision]
        assert train.main(command) == 0
        assert seen.pop() == expected
        assert [each.fp32_precision for each in settings] == before
        report = json.loads((here / precision / "run.json").read_text())
        assert report["settings"]["precision"] == precision


def test_a_run_goes_on_in_the_precision_it_used(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One for which a GPU chose bf16 goes on with it where there is none, by the same command."""
    command = [*OPTIONS, "--max-steps", "2", "--output", "run"]
    with monkeypatch.context() as patch:
        patch.setattr("fastalex.training.prepare.has_bf16", lambda world: True)
        before_step(1, patch, terminate)
        assert train.main(command) == 75
    assert "precision: bf16 (" in capsys.readouterr().out
    assert train.main([*command, "--precision", "float32"]) == 2
    assert "--precision bf16 and not --precision float32" in capsys.readouterr().err
    assert train.main(command) == 0
    assert "precision: bf16 (" in capsys.readouterr().out
    assert read_metadata(here / "run" / "model.safetensors")["precision"] == "bf16"


@pytest.mark.parametrize(
    ("options", "device", "message"),
    [
        (["--fused-update", "--precision", "fp16"], "cuda", r"^--fused-update can't .* float16"),
        (["--cuda-graph"], "cpu", r"^--cuda-graph needs a GPU"),
        (["--cuda-graph", "--precision", "fp16"], "cuda", r"^--cuda-graph needs --fused-update"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str], device: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.choose(parse_arguments(options), device)
