"""What the doctor says of a machine without a GPU, of a broken one, and of faults."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalex.training import check, layer_check
from fastalex.tuning import doctor, kernel_health
from tests._commands import environment

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def _doctor(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    given = {**environment(), **variables}
    return subprocess.run(
        [sys.executable, "-m", "fastalex.doctor", *options],
        capture_output=True, text=True, timeout=300, env=given,
    )  # fmt: skip


def _rows(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    report = json.loads(capsys.readouterr().out)
    return {row["what"]: row for row in report["rows"]}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_health, "compiled", lambda names: iter(()))
    monkeypatch.setattr(kernel_health, "interpreted", lambda: iter(()))


@pytest.mark.slow
@pytest.mark.compiled
def test_without_a_gpu_kernels_compile_and_are_interpreted() -> None:
    process = _doctor()
    assert process.returncode == 0, process.stdout + process.stderr
    lines = process.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[-1] == "nothing is wrong"
    found = {line.split()[0]: line.split()[1] for line in lines if line.startswith("  ")}
    for name in ("torch", "triton", "sm_90", "conv2d_relu", "lrn_max_pool2d"):
        assert found[name] == "ok"


@pytest.mark.usefixtures("quick")
def test_what_is_too_old_or_missing_is_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = importlib.metadata.version
    old = {"triton": "2.1.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda n: old.get(n) or version(n))
    assert doctor.main(["--json"]) == 1
    rows = _rows(capsys)
    assert rows["torch"]["verdict"] == "ok"
    assert rows["triton"]["verdict"] == "wrong"
    assert rows["triton"]["text"] == "2.1.0, needed is 3.6 or newer; pip install -U 'triton>=3.6'"
    assert "GPU" not in rows  # nothing else can be looked at


def test_a_broken_triton_is_no_traceback(tmp_path: Path) -> None:
    broken = tmp_path / "triton"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('libtriton.so: no such file')\n")
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    process = _doctor(PYTHONPATH=path)
    assert (process.returncode, process.stderr) == (1, "")
    assert "triton                 wrong  ImportError: libtriton.so: no such file" in process.stdout
    assert process.stdout.endswith("1 of 8 are wrong\n")


@pytest.mark.usefixtures("quick")
def test_a_wrong_kernel_makes_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = doctor.Row("interpreted", "max_pool2d", "wrong", "error 3.0e-01, allowed 1.0e-06 " * 6)
    monkeypatch.setattr(kernel_health, "interpreted", lambda: iter([wrong]))
    assert doctor.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[-1].endswith("are wrong")


def test_a_planted_fault_is_seen_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = kernel_health.kernels.max_pool2d
    monkeypatch.setattr(kernel_health.kernels, "max_pool2d", lambda *a: pool(*a) * 1.001)
    rows = {row[1]: row for row in kernel_health.interpreted()}
    assert rows.pop("max_pool2d")[2] == "wrong"
    assert {row[2] for row in rows.values()} == {"ok"}


def test_what_the_check_found_of_a_step_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = check.Verdicts(torch.device("cpu"))
    fast = layer_check.Verdict(2e-3, 8e-3, None, ours=1e-5, aten=3e-5)
    slow = layer_check.Verdict(2e-3, 8e-3, None, ours=4e-5, aten=3e-5)
    wrong = layer_check.Verdict(0.2, 8e-3, "forward: output 2.0e-01 from float64")
    key = "{} Layer() [{}, 256, 256, 3] bfloat16 []"
    store.keep({key.format("conv1", 128): fast, key.format("conv2", 128): slow})
    store.keep({key.format("fc6", 128): wrong, key.format("fc7", 64): wrong})
    rows = list(kernel_health.verdict_rows(store, "bf16", 128))
    assert [(row[1], row[2]) for row in rows] == [
        ("conv1", "ok"), ("conv2", "ok"), ("fc6", "wrong"),
    ]  # fmt: skip
    text = "error 2.0e-03, allowed 8.0e-03; 10 us, ATen 30; a step uses triton"
    assert rows[0][3] == text
    assert rows[1][3].endswith("40 us, ATen 30; a step uses aten")
    assert rows[2][3].endswith("a step uses aten; forward: output 2.0e-01 from float64")


def test_a_gpu_that_is_too_old_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(kernel_health, "too_old", lambda index: "T4 is too old")
    assert list(kernel_health.on_gpu(False)) == [("kernels", "GPU", "-", "T4 is too old")]


def test_refused() -> None:
    process = _doctor("--quick")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("doctor: error: unrecognized arguments: --quick")
    assert process.stderr.count("\n") == 1
