"""TensorBoard's files, read back by TensorBoard, and where the time of a run goes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from fastalex.common.timing import Stopwatch
from fastalex.distributed.exchange import counted_times
from fastalex.training import train
from fastalex.training.metrics import RunningMetrics, TensorBoard


def test_records_come_back(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="needs the package of the extra 'tensorboard'",
    )
    writer = TensorBoard(tmp_path)
    for step in (1, 2, 3):
        writer.add({"kind": "step", "step": step, "loss": 1 / step, "grad_norm": None})
    writer.add({"kind": "epoch", "step": 3, "val_loss": 0.5, "top1": 0.25, "top5": 0.75})
    writer.close()
    again = TensorBoard(tmp_path, step=1)  # resumed after step 1
    again.add({"kind": "step", "step": 2, "loss": 7.0})
    again.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 7.0)]
    assert "train/grad_norm" not in events.Tags()["scalars"]


def test_a_missing_package_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert train.main(["--tensorboard"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "fastalex[tensorboard]" in said
    assert list(tmp_path.iterdir()) == []


def test_waiting_exchange_and_the_rest_add_up() -> None:
    exchange = Stopwatch()
    meter = RunningMetrics(2, exchange)
    with meter.waiting():
        time.sleep(0.02)
    with exchange.running(torch.device("cpu")):
        time.sleep(0.03)
    with meter.paused():
        time.sleep(0.5)
    meter.add(1.0, 8)
    meter.add(2.0, 8)
    meter.add(4.0, 8)
    record = meter.record()
    assert record["loss"] == 3.0
    parts = [record[f"{name}_seconds"] or 0.0 for name in ("data", "exchange", "compute")]
    assert parts[0] >= 0.02
    assert parts[1] >= 0.03
    assert sum(parts) == pytest.approx(record["seconds"])
    again = meter.record()
    assert (again["data_seconds"], again["exchange_seconds"]) == (0.0, 0.0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_exchange_of_every_step_counts_once(device: str) -> None:
    times = [counted_times(step, torch.device(device)) for step in range(1, 101)]
    assert sum(times) == 100
    assert sum(map(bool, times)) == (100 if device == "cpu" else 20)
