"""bench/gpu_day.sh: its dry run, and that a failed step stops nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests._commands import ROOT, environment

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
STEPS = ["environment", "step", "layers", "tests", "tune", "profile"]


def _run(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    given = {
        k: v
        for k, v in environment().items()
        if k not in ("DRY_RUN", "TRITON_INTERPRET", "PYTEST_XDIST_WORKER")
    }
    return subprocess.run(
        ["bash", str(ROOT / "bench/gpu_day.sh"), *options],
        cwd=folder, capture_output=True, text=True, timeout=500,
        env={**given, "RESULTS": str(folder), "PYTHON": sys.executable, **variables},
    )  # fmt: skip


def _summary(output: str) -> dict[str, str]:
    lines = output[output.index("== summary") :].splitlines()[1:-1]
    return {line.split()[0]: line.split(" s  ", 1)[1] for line in lines}


@pytest.mark.slow
def test_the_dry_run_does_every_step(tmp_path: Path) -> None:
    process = _run(tmp_path, "--dry-run")
    assert process.returncode == 0, process.stdout + process.stderr
    assert _summary(process.stdout) == dict.fromkeys(STEPS, "passed")
    for theme in ("tiles", "step", "layers", "profile"):
        (path,) = tmp_path.glob(f"{theme}_cpu_??????.json")
        content = json.loads(path.read_text())
        assert content["versions"]["torch"] == torch.__version__
        assert content["commit"]
        assert content.get("results") or content.get("tiles")
    assert not json.loads(next(tmp_path.glob("tiles_*.json")).read_text())["timed"]
    (log,) = tmp_path.glob("gpu_day_*.log")
    assert log.read_text().strip() == process.stdout.strip()
    assert (tmp_path / "profile" / "profile.png").is_file()


def test_a_failed_step_does_not_stop_the_rest(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *pytest*) exit 3 ;; esac\nexec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    chosen = "tests layers environment"
    process = _run(tmp_path, DRY_RUN="1", PYTHON=str(python), STEPS=chosen)
    assert process.returncode == 1
    failed = "failed with code 3"
    expected = {"environment": "passed", "tests": failed, "layers": failed}
    assert _summary(process.stdout) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    process = _run(tmp_path)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("gpu_day: error: torch finds no GPU here; --dry-run")
    process = _run(tmp_path, "--quick")
    assert process.returncode == 2
    assert process.stderr == "gpu_day: error: --quick: the only option is --dry-run\n"
    assert os.listdir(tmp_path) == []
