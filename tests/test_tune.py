"""Tuned tiles: how they are found, which table is believed, and what a launch makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalex import offline, tune, tuning
from fastalex_kernels import _launch, _tuned
from tests._commands import environment

GPU = "NVIDIA Test GPU"
KEY = ("linear", "bfloat16", (128, 4096, 9216, 0, 1))
TILE = (128, 128, 64, 8, 3)
OWN = (128, 64, 64, 4, 4)


def _content(**changes: Any) -> dict[str, Any]:
    kernel, kind, sizes = KEY
    entry = {"kernel": kernel, "kind": kind, "sizes": list(sizes), "tile": list(TILE)}
    return {"timed": True, **_tuned.identity(GPU), "tiles": [entry], **changes}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "tiles.json"
    monkeypatch.setenv(_tuned.VARIABLE, str(path))
    _tuned._table.cache_clear()
    yield path
    _tuned._table.cache_clear()


def test_a_launch_takes_the_tuned_tile(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table.write_text(json.dumps(_content()))
    monkeypatch.setattr(_launch, "target", lambda device: "sm_90")
    monkeypatch.setattr(_launch, "_device_name", lambda device: GPU)
    x = torch.empty(1, dtype=torch.bfloat16)
    tiles = {("sm_90", 16): OWN, ("other", 16): OWN, ("other", 32): OWN}
    assert _launch.tile_entry(tiles, x, "linear", *KEY[2]) == TILE
    assert _launch.tile_entry(tiles, x, "linear", 64, *KEY[2][1:]) == OWN  # another batch
    assert _launch.tile_entry(tiles, x, "linear update", *KEY[2]) == OWN
    assert _launch.tile_entry(tiles, x.half(), "linear", *KEY[2]) == OWN
    monkeypatch.setattr(_launch, "_device_name", lambda device: None)  # launches are recorded
    assert _launch.tile_entry(tiles, x, "linear", *KEY[2]) == OWN


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"device": "NVIDIA H100 PCIe"}, "it is of device NVIDIA H100 PCIe, here is"),
        ({"kernels": "0" * 16}, "run python -m fastalex.tune"),
        ({"triton": "2.0.0"}, "it is of triton 2.0.0"),
        ({"timed": False}, "it was computed, not timed"),
        ({"tiles": [{"kernel": "linear"}]}, "no table of fastalex.tune"),
        ({"tiles": 3}, "no table of fastalex.tune"),
    ],
)
def test_a_table_of_something_else_is_ignored(
    table: Path, changes: dict[str, Any], why: str
) -> None:
    table.write_text(json.dumps(_content(**changes)))
    with pytest.warns(UserWarning, match=why):
        assert _tuned.tuned_tile(KEY, OWN, GPU) == OWN
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _tuned.tuned_tile(KEY, OWN, GPU) == OWN  # says so once


def test_a_damaged_table_is_ignored(table: Path) -> None:
    table.write_text(json.dumps(_content())[:40])
    with pytest.warns(UserWarning, match="is not used"):
        assert _tuned.tuned_tile(KEY, OWN, GPU) == OWN


def test_without_a_table_nothing_is_said(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(_tuned.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _tuned.tuned_tile(KEY, OWN, GPU) == OWN
    _tuned._table.cache_clear()
    path = tmp_path / "fastalex" / "tiles_nvidia-test-gpu.json"
    path.parent.mkdir()
    path.write_text(json.dumps(_content()))
    assert _tuned.tuned_tile(KEY, OWN, GPU) == TILE


def _problem(*seconds: float | None) -> tuning.Problem:
    candidates = [
        tuning.Candidate((64, 64, 32, 4, i + 1), seconds=s) for i, s in enumerate(seconds)
    ]
    return tuning.Problem("conv2", "forward", KEY, candidates)


def test_the_tables_own_tile_stays_unless_another_is_clearly_faster() -> None:
    for seconds, chosen in (((1.0, 0.98), 0), ((1.0, 0.9, 0.8), 2), ((1.0, None), 0)):
        problem = _problem(*seconds)
        assert tuning.best(problem) is problem.candidates[chosen]
    problem = _problem(1.0, 0.5)
    problem.candidates[1].skipped = "spills"
    assert tuning.best(problem) is problem.own
    assert tuning.entry(problem)["skipped"] == [{"tile": [64, 64, 32, 4, 2], "why": "spills"}]
    problem.candidates[0].skipped, problem.candidates[1].skipped = "spills", None
    assert tuning.best(problem) is problem.candidates[1]


@pytest.mark.parametrize("bits", [16, 32])
def test_candidates_fit_and_none_comes_twice(bits: int) -> None:
    for shared in (99 << 10, 227 << 10):
        own, *others = tuning.candidate_tiles(OWN, bits, shared)
        assert own == OWN
        assert len(set(others)) == len(others) > 8
        for m, n, k, warps, stages in others:
            assert stages * (m + n) * k * bits // 8 <= shared
            assert 8 <= m * n / (32 * warps) <= 128  # sums in a thread's registers


def test_a_candidate_that_spills_or_fails_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Code:
        spills, stack, shared = 3, 16, 0

    launch = offline.Launch(_launch._probe, (1,), (), {})
    spilling, large, failing = (tuning.Candidate(OWN, launches=[launch]) for _ in range(3))
    monkeypatch.setattr(offline, "compile_launch", lambda launch, target: None)
    monkeypatch.setattr(offline, "read", lambda compiled: Code)
    assert tuning._unfit(spilling, "sm_90", 1) == "_probe spills (3 instructions, 16 bytes)"
    Code.spills = Code.stack = 0
    Code.shared = 5
    assert "needs 5 bytes of shared memory, there are 4" in str(tuning._unfit(large, "sm_90", 4))

    def fail(launch: offline.Launch, target: str) -> None:
        raise RuntimeError("no such layout\nmore")

    monkeypatch.setattr(offline, "compile_launch", fail)
    problem = tuning.Problem("fc8", "forward", KEY, [failing])
    tuning.compile_candidates([problem], "sm_90", 1 << 20, lambda: None)
    assert failing.skipped == "RuntimeError: no such layout"


def _interpret(arguments: list[str], folder: Path, code: str | None = None) -> Any:

    program = ["-m", "fastalex.tune", *arguments] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *program], cwd=folder, capture_output=True, text=True, timeout=240,
        env={**environment(), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


SWEEP = ["--dry-run", "--layer", "conv5", "--batch-size", "1", "--image-size", "67"]


def test_a_sweep_in_the_interpreter_writes_a_table_that_is_used(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    options = [*SWEEP, "--dtype", "fp32", "--candidates", "2", "--output", str(path)]
    process = _interpret(options, tmp_path)
    assert process.returncode == 0, process.stderr
    assert f"table {path}" in process.stdout
    found = _tuned.read_table(path, "interpreter")
    content = json.loads(path.read_text())
    assert {entry["pass"] for entry in content["tiles"]} == {"forward", "backward"}
    kernels = {"conv2d forward", "conv2d input", "conv2d weight"}
    assert {key[0] for key in found} == kernels
    for entry in content["tiles"]:
        assert entry["us"] == min(t["us"] for t in entry["tried"] if t["tile"] == entry["tile"])
        assert entry["us"] <= entry["own us"]


def test_a_wrong_candidate_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    problem = _problem(None, None)
    wrong = problem.candidates[1]

    def check() -> None:
        if _launch.tuned_tile(KEY, OWN, None) == wrong.tile:
            raise tuning.WrongResult("fc6: output is 1.0e-01 away from float64")

    task = tuning.Task("fc6", "forward", lambda: _launch.tuned_tile(KEY, OWN, None), check)

    class Recording:
        def __init__(self, task: Any, target: str, tile: Any, launching: bool) -> None:
            timed.append(tile[KEY])
            self.launches: dict[Any, list[Any]] = {KEY: []}

    monkeypatch.setattr(tuning, "_Recording", Recording)
    tuning.time_candidates(problem, task, "sm_90", iter(range(99)).__next__, rounds=2)
    assert timed == [problem.own.tile]
    assert wrong.skipped is not None
    assert wrong.skipped.startswith("fc6: output is 1.0e-01")
    assert (problem.own.seconds, wrong.seconds) == (1, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "tune: error: torch finds no GPU here; --dry-run --gpu h100 ranks tiles without one"),
        (["--dry-run", "--layer", "pool1"], "tune: error: --layer pool1: expected some of conv1"),
    ],
)
def test_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(options) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith(message)
    assert error.count("\n") == 1
