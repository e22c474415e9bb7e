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

from bench import card
from tests._commands import ROOT, environment

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
STEPS = ["environment", "doctor", "step", "train", "layers", "tune", "tests"]


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
    for theme in ("tiles", "step", "layers"):
        (path,) = tmp_path.glob(f"{theme}_cpu_??????.json")
        content = json.loads(path.read_text())
        assert content["versions"]["torch"] == torch.__version__
        assert content["commit"]
        assert content.get("results") or content.get("tiles")
    assert not json.loads(next(tmp_path.glob("tiles_*.json")).read_text())["timed"]
    (log,) = tmp_path.glob("gpu_day_*.log")
    assert log.read_text().strip() == process.stdout.strip()


@pytest.mark.slow
def test_a_cut_off_day_leaves_a_whole_card_and_goes_on(tmp_path: Path) -> None:
    """One step fails, one hangs after its first result, one is killed in the middle of a file."""
    row = {"layer": "step", "direction": "training", "against": "stock", "ours ms": 2.5}
    partial = json.dumps({"results": [row]})
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
*bench_layers*) exit 3 ;;
*bench_step*)
    if [ -e "{tmp_path}/again" ]; then exit 0; fi
    echo '{partial}' >"{tmp_path}/step_cpu_202611.json"
    sleep 100 ;;
*fastalex.doctor*) echo '{{"rows": ['; kill -9 $$ ;;
esac
exec "{sys.executable}" "$@"
"""
    )
    python.chmod(0o755)
    chosen = {"PYTHON": str(python), "STEPS": "environment doctor step layers", "LIMIT_step": "2"}
    process = _run(tmp_path, DRY_RUN="1", **chosen)
    assert process.returncode == 1
    ends = {
        "environment": "passed", "doctor": "stopped after 240 s", "step": "stopped after 2 s",
        "layers": "failed with code 3",
    }  # fmt: skip
    found = _summary(process.stdout)
    assert found == ends | {"doctor": found["doctor"]}
    assert found["doctor"] != "passed"
    (path,) = tmp_path.glob("card_*.json")
    card = json.loads(path.read_text())
    assert card["versions"]["torch"] == torch.__version__
    assert card["commit"]
    assert card["steps"] == found
    assert card["doctor"] == card["layers"] == "unmeasured"
    assert card["step"][0]["ours ms"] == 2.5
    assert set(card["images/s as trained"].values()) == {"unmeasured"}
    page = path.with_suffix(".md").read_text()
    assert "| step | training | stock | 2.500 | unmeasured | unmeasured |" in page

    (tmp_path / "again").touch()
    process = _run(tmp_path, DRY_RUN="1", **chosen)
    found = _summary(process.stdout)
    assert (found["environment"], found["step"]) == ("passed before", "passed")
    assert found["layers"] == "failed with code 3"  # tried again


def test_the_card_holds_what_was_measured(tmp_path: Path) -> None:
    (tmp_path / "train_2_128_bf16").mkdir()
    rates = [None, 10.0, 900.0, 1000.0, 1100.0]
    records = [{"kind": "step", "images_per_s": rate} for rate in rates] + [{"kind": "epoch"}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "train_2_128_bf16" / "metrics.jsonl").write_text(lines)
    good = {"part": "bf16, batch 128", "what": "conv1", "verdict": "ok", "text": ""}
    rows = [
        {**good, "values": {"uses": "triton"}},
        {**good, "what": "conv2", "values": {"uses": "aten"}},
        {**good, "what": "fc6", "verdict": "wrong", "text": "forward", "values": {"uses": "aten"}},
    ]
    (tmp_path / "doctor.json").write_text(json.dumps({"rows": rows}))
    found = card.card(tmp_path)
    assert found["images/s as trained"]["2 GPU, batch 128, bf16"] == 1000.0
    assert found["doctor"] == {
        "looked at": 3,
        "wrong": ["bf16, batch 128: fc6: forward"],
        "runs on ATen": ["bf16, batch 128: conv2", "bf16, batch 128: fc6"],
    }
    assert "| 2 GPU, batch 128, bf16 | 1,000 |" in card.page(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    process = _run(tmp_path)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("gpu_day: error: torch finds no GPU here; --dry-run")
    process = _run(tmp_path, "--quick")
    assert process.returncode == 2
    assert process.stderr == "gpu_day: error: --quick: the only option is --dry-run\n"
    assert os.listdir(tmp_path) == []
