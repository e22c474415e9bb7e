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

from fastalex import cost, layer_pairs, offline, tune, tuning
from fastalex.gpus import GPUS
from fastalex.inspection import Row
from fastalex.layer_pairs import WrongResult
from fastalex.recorded_step import record_step
from fastalex.tuning_candidates import candidates, follows_tile
from fastalex.tuning_problems import Candidate, Problem, Subject, Task, fake_problems, tasks
from fastalex_kernels import _launch, _tuned
from tests._commands import environment

GPU = "NVIDIA Test GPU"
KEY = ("linear", "bfloat16", (128, 4096, 9216, 0, 1))
TILE = (128, 128, 64, 8, 3)
OWN = (128, 64, 64, 4, 4)


ENTRY = {"kernel": KEY[0], "kind": KEY[1], "sizes": list(KEY[2]), "tile": list(TILE)}
SHARED = offline.TARGETS["sm_90"].shared_limit


def _content(**changes: Any) -> dict[str, Any]:
    return {"timed": True, **_tuned.identity(GPU), "tiles": [ENTRY], **changes}


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
        ({"tiles": [ENTRY | {"tile": [128, 128, 64, 8]}]}, "for a tile of linear"),
        ({"tiles": [ENTRY | {"tile": [128, 128, 0, 8, 3]}]}, "for a tile of linear"),
        ({"tiles": [ENTRY | {"kernel": "linear parts"}]}, "for a tile of linear parts"),
        ({"tiles": [ENTRY | {"kernel": "attention"}]}, "for a tile of attention"),
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


def _problem(*seconds: float | None) -> Problem:
    candidates = [Candidate((64, 64, 32, 4, i + 1), seconds=s) for i, s in enumerate(seconds)]
    return Problem("conv2", "forward", KEY, candidates)


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
        own, *others = candidates(KEY, OWN, "sm_90", bits, shared)
        assert own == OWN
        assert len(set(others)) == len(others) > 8
        for m, n, k, warps, stages in others:
            assert stages * (m + n) * k * bits // 8 <= shared
            assert 8 <= m * n / (32 * warps) <= 128  # sums in a thread's registers


@pytest.mark.parametrize(
    ("kernel", "sizes", "own", "allowed"),
    [
        ("linear parts", (128, 64), (4,), lambda parts: parts <= 16),  # of 4 steps and more
        ("conv2d weight parts", (5, 40), (1,), lambda parts: parts <= 10),
        ("lrn forward", (128, 27, 27, 13, 13, 256, 2), (128, 3, 5), lambda t, s, r: r <= 13),
        # A program holds whole groups: of 96 chunks here.
        ("lrn backward", (128, 27, 27, 13, 13, 768, 1), (128, 14), lambda t, r: t >= 96),
        ("pool forward", (128, 13, 13, 6, 6, 256, 1, 3, 2, 0), (1, 1), lambda m, warps: m >= 1),
    ],
)
def test_few_candidates_beside_products(
    kernel: str, sizes: tuple[int, ...], own: tuple[int, ...], allowed: Any
) -> None:
    first, *others = dict.fromkeys(candidates((kernel, "bfloat16", sizes), own, "sm_90", 16, 0))
    assert first == own
    assert 1 <= len(others) <= 4
    for tile in others:
        assert len(tile) == len(_tuned.FIELDS[kernel])
        assert min(tile) >= 1
        assert allowed(*tile), tile


@pytest.fixture(scope="module")
def posed() -> dict[int, list[Problem]]:
    """The problems of the paper's net on an H100, by the number of GPUs."""
    found = {}
    for gpus in (1, 2):
        subject = Subject("paper", 128, torch.bfloat16, layer_pairs.layer_names(), towers=gpus)
        found[gpus], _ = fake_problems(subject, "sm_90", SHARED, limit=2)
    return found


@pytest.mark.parametrize("gpus", [1, 2])
def test_what_a_training_step_looks_up_is_tuned(gpus: int, posed: dict[int, list[Problem]]) -> None:
    looked_up: dict[_tuned.Key, _tuned.Tile] = {}
    with _tuned.choosing(lambda key, own: looked_up.setdefault(key, own)):
        record_step("sm_90", 128, towers=gpus)
    problems = {problem.key: problem for problem in posed[gpus]}
    absent = {"linear half parts"} if gpus == 1 else set()  # a tower begins with a half
    assert {key[0] for key in looked_up} == set(_tuned.FIELDS) - absent
    for key, own in looked_up.items():
        assert len(own) == len(_tuned.FIELDS[key[0]])
        if not (follows_tile(key) and key not in problems):
            assert problems[key].own.tile == own
            assert len(problems[key].candidates) == 2


def test_a_reduction_of_a_few_steps_is_no_problem(posed: dict[int, list[Problem]]) -> None:
    steps = [problem.key[2][-1] for problem in posed[1] if follows_tile(problem.key)]
    assert len(steps) == 11  # five weights of convolutions, forward and dx of three layers
    assert min(steps) >= 8


def test_parts_follow_from_the_tile_that_is_taken() -> None:
    subject = Subject("paper", 128, torch.bfloat16, ["fc8"])

    def found(settled: dict[_tuned.Key, _tuned.Tile]) -> dict[str, Problem]:
        problems, _ = fake_problems(subject, "sm_90", SHARED, 9, settled)
        return {p.key[0]: p for p in problems if p.direction == "forward"}

    own = found({})
    other = found({own["linear"].key: (128, 256, 64, 8, 4)})
    parts, others = own["linear parts"], other["linear parts"]
    assert parts.key[2][:5] == others.key[2][:5]
    assert (parts.key[2][5], others.key[2][5]) == (16, 4)  # programs for 1000 outputs
    for problem in (parts, others):
        for candidate in problem.candidates:
            product, *finish = candidate.launches
            assert product.grid[2] == product.kwargs["SPLIT"] == candidate.tile[0]
            assert len(finish) == (candidate.tile != (1,))
    assert {launch.kwargs["BLOCK_N"] for launch in others.own.launches[:1]} == {256}


def test_a_sweep_settles_tiles_before_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the end a table holds the parts of the tile that it holds."""
    taken: list[tuple[_tuned.Key, dict[_tuned.Key, _tuned.Tile]]] = []

    def time_candidates(problem: Problem, *rest: Any) -> None:
        taken.append((problem.key, rest[-1]))
        for i, candidate in enumerate(problem.left()):
            candidate.seconds = 1.0 / (i + 1)  # the last is the fastest

    monkeypatch.setattr(tuning, "time_candidates", time_candidates)
    monkeypatch.setattr(tuning, "compile_candidates", lambda *_: None)
    monkeypatch.setattr(tune, "target_of", lambda device: "sm_90")
    options = ["--layer", "fc8", "--batch-size", "16", "--dtype", "fp32", "--candidates", "2"]
    sweep = tune._Sweep(tune._parser().parse_args(options), torch.device("cpu"))
    sweep.run()
    first = [key for key, settled in taken if not settled]
    assert {key[0] for key in first} == {"linear", "linear update"}
    best = {problem.key: tuning.best(problem).tile for problem in sweep.done}
    parts = [key for key, settled in taken if settled]
    assert [key[0] for key in parts] == ["linear parts"] * 2
    assert sweep.done[0].own.tile[1] != best[sweep.done[0].key][1]
    for key in parts:
        tile = best["linear", "float32", key[2][:5]]
        assert key[2][5] == -(-key[2][1] // tile[1])
    assert sweep.missed == 0
    late = tune._Sweep(tune._parser().parse_args([*options, "--seconds", "1"]), torch.device("cpu"))
    late._deadline = 0.0
    late.run()
    assert (late.done, late.missed) == ([], len(first) + 2)


def test_a_tower_computes_what_its_reference_does() -> None:
    subject = Subject("paper", 2, torch.float32, layer_pairs.layer_names(), 67, towers=2)
    pairs = subject.pairs("cpu")
    assert [task.layer for task in tasks(pairs)][::2][:3] == ["conv1", "pool1", "conv2"]
    for pair in pairs.values():
        layer_pairs.check(pair, "aten")
    shapes = {name: (pair.input.shape[1], pair.ours) for name, pair in pairs.items()}
    assert [channels for channels, _ in shapes.values()] == [
        3, 48, 48, 128, 256, 192, 192, 128, 9216, 4096, 4096
    ]  # fmt: skip
    assert shapes["fc8"][1].weight.shape == (1000, 4096)
    assert shapes["fc7"][1].weight.shape == (2048, 4096)


def test_time_to_issue() -> None:
    gpu = GPUS["h100"]
    clock = gpu.peak_tflops["bf16"] * 1e12 / (132 * 4096)
    for programs, rounds in ((1, 1), (132, 1), (133, 2), (264, 2)):
        instructions = torch.full((programs,), 4000.0).numpy()
        expected = rounds * (4000 / 4 + 1500) / clock
        assert cost.issue_seconds(gpu, instructions, 1) == pytest.approx(expected)
    both = cost.issue_seconds(gpu, torch.full((264,), 4000.0).numpy(), 2)
    assert both == pytest.approx((2 * 4000 / 4 + 1500) / clock)  # two share the schedulers


def test_score_without_products(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("pool1", "forward", "kernel", read=2_000_000, written=1_000_000)
    monkeypatch.setattr(tuning, "inspect", lambda *_: [row])
    launch = offline.Launch(_launch._probe, (1,), (), {})
    problem = Problem("pool1", "forward", KEY, [Candidate((8, 4), launches=[launch])])
    gpu = GPUS["h100"]
    for seconds, score in ((4e-6, 0.25), (5e-7, 1.0), (None, None)):
        row.issue_seconds, problem.own.score = seconds, None
        tuning.rank(problem, None, gpu, "bf16")  # type: ignore[arg-type]
        assert problem.own.score == (score and pytest.approx(score))  # 3 MB take 1 us


def test_a_candidate_that_spills_or_fails_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Code:
        spills, stack, shared = 3, 16, 0

    launch = offline.Launch(_launch._probe, (1,), (), {})
    spilling, large, failing = (Candidate(OWN, launches=[launch]) for _ in range(3))
    monkeypatch.setattr(offline, "compile_launch", lambda launch, target: None)
    monkeypatch.setattr(offline, "read", lambda compiled: Code)
    assert tuning._unfit(spilling, "sm_90", 1) == "_probe spills (3 instructions, 16 bytes)"
    Code.spills = Code.stack = 0
    Code.shared = 5
    assert "needs 5 bytes of shared memory, there are 4" in str(tuning._unfit(large, "sm_90", 4))

    def fail(launch: offline.Launch, target: str) -> None:
        raise RuntimeError("no such layout\nmore")

    monkeypatch.setattr(offline, "compile_launch", fail)
    problem = Problem("fc8", "forward", KEY, [failing])
    tuning.compile_candidates([problem], "sm_90", 1 << 20, lambda: None)
    assert failing.skipped == "RuntimeError: no such layout"


def _interpret(arguments: list[str], folder: Path, code: str | None = None) -> Any:

    program = ["-m", "fastalex.tune", *arguments] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *program], cwd=folder, capture_output=True, text=True, timeout=240,
        env={**environment(), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


SWEEP = ["--dry-run", "--layer", "conv5", "pool5", "--batch-size", "1", "--image-size", "67"]


def test_a_sweep_in_the_interpreter_writes_a_table_that_is_used(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    options = [*SWEEP, "--dtype", "fp32", "--candidates", "2", "--output", str(path)]
    process = _interpret(options, tmp_path)
    assert process.returncode == 0, process.stderr
    assert f"table {path}" in process.stdout
    found = _tuned.read_table(path, "interpreter")
    content = json.loads(path.read_text())
    assert {entry["pass"] for entry in content["tiles"]} == {"forward", "backward"}
    kernels = {"conv2d forward", "conv2d input", "conv2d weight", "pool forward", "pool backward"}
    assert {key[0] for key in found} == kernels
    for entry in content["tiles"]:
        assert entry["us"] == min(t["us"] for t in entry["tried"] if t["tile"] == entry["tile"])
        assert entry["us"] <= entry["own us"]


def test_a_wrong_candidate_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[dict[_tuned.Key, _tuned.Tile]] = []
    settled = {("linear update", "bfloat16", (4096,)): TILE}
    problem = _problem(None, None)
    wrong = problem.candidates[1]

    def check() -> None:
        assert [_launch.tuned_tile(key, OWN, None) for key in settled] == [TILE]
        if _launch.tuned_tile(KEY, OWN, None) == wrong.tile:
            raise WrongResult("fc6: output is 1.0e-01 away from float64")

    task = Task("fc6", "forward", lambda: _launch.tuned_tile(KEY, OWN, None), check)

    class Recording:
        def __init__(self, task: Any, target: str, tile: Any, launching: bool) -> None:
            timed.append(tile)
            self.launches: dict[Any, list[Any]] = {KEY: []}

    monkeypatch.setattr(tuning, "Recording", Recording)
    tuning.time_candidates(problem, task, "sm_90", iter(range(99)).__next__, 2, settled)
    assert timed == [{**settled, KEY: problem.own.tile}]
    assert wrong.skipped is not None
    assert wrong.skipped.startswith("fc6: output is 1.0e-01")
    assert (problem.own.seconds, wrong.seconds) == (1, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "tune: error: torch finds no GPU here; --dry-run --gpu h100 ranks tiles without one"),
        (["--dry-run", "--layer", "pool3"], "tune: error: --layer pool3: expected some of conv1"),
        (
            ["--dry-run", "--gpus", "2", "--variant", "owt"],
            "tune: error: --gpus 2: variant owt has no two towers, use --gpus 1",
        ),
    ],
)
def test_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(options) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith(message)
    assert error.count("\n") == 1
