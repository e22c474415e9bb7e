"""What the profiler measures, writes and refuses, on a CPU at small sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastalex_kernels as kernels
from fastalex.common.timing import overwrites
from fastalex.tuning import layer_pairs, profiler
from fastalex.tuning.train_steps import Step, Training, check_steps, stock_step

SMALL = ["--batch-size", "2", "--rounds", "3", "--image-size", "67", "--no-compile"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    options = [*SMALL, "--layer", "pool5", "conv5", "--device", "cpu", "--output", str(folder)]
    assert profiler.main(options) == 0
    return folder


def _report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "profile.json").read_text())
    return report


def test_every_round_of_every_pass_is_kept(small: Path) -> None:
    report = _report(small)
    rows = [(row["layer"], row["pass"]) for row in report["results"]]
    passes = ("forward", "backward")
    assert rows == [(layer, which) for layer in ("conv5", "pool5") for which in passes]
    for row in report["results"]:
        assert list(row["ms"]) == ["ours", "torch"]
        for name, milliseconds in row["ms"].items():
            assert sorted(row["rounds ms"][name])[1] == milliseconds > 0
    assert report["versions"]["torch"] == torch.__version__
    assert sorted(p.name for p in small.iterdir()) == ["profile.json", "trace.json"]


def test_the_trace_shows_what_each_call_did(small: Path) -> None:
    events = json.loads((small / "trace.json").read_text())["traceEvents"]
    ranges = {e["name"]: e for e in events if e.get("cat") == "user_annotation"}
    expected = {
        f"{layer} {which}, {name}"
        for layer in ("conv5", "pool5")
        for which in ("forward", "backward")
        for name in ("ours", "torch")
    }
    assert expected <= set(ranges)

    def inside(name: str) -> set[str]:
        begin, end = ranges[name]["ts"], ranges[name]["ts"] + ranges[name]["dur"]
        return {e["name"] for e in events if e.get("cat") == "cpu_op" and begin <= e["ts"] <= end}

    assert "aten::relu" in inside("conv5 forward, torch")
    assert "aten::conv2d" in inside("conv5 forward, torch")
    assert "aten::convolution_backward" in inside("conv5 backward, ours")
    assert "aten::max_pool2d_with_indices" in inside("pool5 forward, torch")
    assert "aten::conv2d" not in inside("pool5 forward, torch")


@pytest.mark.slow
def test_the_row_of_the_net_is_a_training_step(tmp_path: Path) -> None:
    least = ["--batch-size", "1", "--rounds", "1", "--device", "cpu"]
    assert profiler.main([*SMALL, *least, "--layer", "net", "--output", str(tmp_path)]) == 0
    (row,) = _report(tmp_path)["results"]
    assert (row["layer"], row["pass"], list(row["ms"])) == ("net", "step", ["ours", "torch"])
    assert 0 <= row["error"] < 1e-5
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    ranges = {e["name"]: e for e in events if e.get("cat") == "user_annotation"}
    for name in ("ours", "torch"):
        begin = ranges[f"net step, {name}"]["ts"]
        end = begin + ranges[f"net step, {name}"]["dur"]
        done = {e["name"] for e in events if e.get("cat") == "cpu_op" and begin <= e["ts"] <= end}
        assert {"aten::convolution", "aten::convolution_backward"} <= done
        assert "aten::_fused_sgd_" in done  # the updates are part of it
        assert ("fastalex::aten_lrn_max_pool2d" in done) == (name == "ours")


@pytest.mark.slow
def test_a_step_that_updates_nothing_is_not_timed() -> None:
    training = Training(torch.device("cpu"), "float32", 1, image_size=67)

    def make(given: Training) -> Step:
        first = stock_step(given)()
        return lambda: first

    with pytest.raises(layer_pairs.WrongResult, match=r"^step 2: loss is .* away from float64"):
        check_steps(training, make)


def test_the_table_holds_ratios() -> None:
    rows = [
        {
            "layer": layer,
            "pass": "forward",
            "ms": {"ours": 2.0, "torch": 5.0},
            "rounds ms": {"ours": [2.0]},
        }
        for layer in ("conv2", "pool2", "net")
    ]
    report = {
        "variant": "paper", "batch_size": 1, "dtype": "bf16", "device": "GPU", "host cpu": "CPU",
        "threads": 1, "versions": {"torch": "2"}, "results": rows,
    }  # fmt: skip
    cells = [line.split() for line in profiler.describe(report)[4:]]
    assert cells[0] == ["conv2", "forward", "2.000", "5.000", "2.50"]
    assert cells[3] == ["layers", "both", "4.000", "10.000", "2.50"]  # without the net


def test_the_floor_of_a_pass_counts_every_gradient() -> None:
    pairs = layer_pairs.make_pairs(3, "paper", "meta", torch.bfloat16)
    assert list(pairs) == layer_pairs.pair_names("paper")
    conv5 = 2 * 3 * 13 * 13 * 256 * (384 // 2 * 9)
    assert pairs["conv5"].floors["forward"].flops == conv5
    assert pairs["conv5"].floors["backward"].flops == 2 * conv5
    conv1 = 2 * 3 * 55 * 55 * 96 * 3 * 121
    assert pairs["conv1"].floors["backward"].flops == conv1  # the images have no gradient
    assert pairs["fc8"].floors["forward"].size == 2 * (3 * 4096 + 4096 * 1000 + 3 * 1000)


@pytest.mark.parametrize("host", [1e-6, 1e-3, 9e-3])
def test_the_gpu_is_busy_for_longer_than_the_host_needs(host: float) -> None:
    assert overwrites(host, each=1e-4) * 1e-4 > host


def test_nothing_wrong_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = kernels.max_pool2d
    monkeypatch.setattr(kernels, "max_pool2d", lambda *a: right(*a) * 1.001)
    code = profiler.main([*SMALL, "--layer", "pool5", "--device", "cpu", "--output", str(tmp_path)])
    output, error = capsys.readouterr()
    assert (code, output) == (2, "")
    assert "profiler: error: pool5: output is 1.0e-03 away from float64" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "conv9"], "--layer conv9: expected some of conv1, pool1, conv2,"),
        (["--batch-size", "0"], "argument --batch-size: expected a whole number of at least 1"),
        (["--layer", "net", "--dtype", "fp16"], "--layer net: a step takes bf16 or fp32"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = profiler.main([*options, "--output", str(tmp_path / "new")])
    except SystemExit as end:
        code = int(str(end.code))
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
