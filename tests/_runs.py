"""Runs of the small net for tests, and what is in their folders."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastalex.training import trainer
from fastalex.training.weights import load_weights
from tests._commands import ROOT

SCRIPT = str(ROOT / "tests" / "_small_train.py")
STEPS, EPOCH = 15, 5  # 40 images in batches of 8, three times
OPTIONS = ["--image-size", "64", "--batch-size", "8", "--epochs", "3", "--lr", "0.002"]
OPTIONS += ["--log-every", "1", "--threads", "1", "--checkpoint-every", "2"]
OPTIONS += ["--keep-checkpoints", "2"]


def before_step(step: int, monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Have runs of this process do ``action`` right before they take ``step``."""
    real = trainer.Trainer._train_step

    def train_step(self: trainer.Trainer, batch: Any) -> None:
        if self.step + 1 == step:
            action()
        real(self, batch)

    monkeypatch.setattr(trainer.Trainer, "_train_step", train_step)


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def records(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in record.items() if "seconds" not in k and k != "images_per_s"}
        for record in lines
    ]


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in records(folder) if record["kind"] == "step"]


def digest(folder: Path, name: str = "model.safetensors") -> str:
    return str(load_weights(folder / name)[1]["sha256"])


def checkpoints(folder: Path) -> list[int]:
    paths = sorted((folder / "checkpoints").glob("*.safetensors"))
    return [int(path.stem.removeprefix("step-")) for path in paths]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
