"""Tuned tiles: how they are found, which table is believed, and what a launch makes of it."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastalex_kernels as kernels
from fastalex import AlexNet
from fastalex.inspection import cost, offline
from fastalex.inspection.gpus import GPUS
from fastalex.inspection.record import record_step
from fastalex.inspection.report import Row
from fastalex.model.variants import VARIANTS
from fastalex.training import TrainStep
from fastalex.tuning import sweep, tune
from fastalex.tuning.candidates import candidates, follows_tile
from fastalex.tuning.sweep import Candidate, Problem, Search
from fastalex.tuning.workloads import WatchedStep
from fastalex_kernels.common import launch, tuned
from fastalex_kernels.common.backend import record_launches
from fastalex_kernels.common.program import Launch
from tests._nets import narrow

GPU = "NVIDIA Test GPU"
KEY = ("linear", "bfloat16", (128, 4096, 9216, 0, 1))
TILE = (128, 128, 64, 8, 3)
OWN = (128, 64, 64, 4, 4)


ENTRY = {"kernel": KEY[0], "kind": KEY[1], "sizes": list(KEY[2]), "tile": list(TILE)}
LAUNCH = Launch("fc8", "forward", None, (1,), [], {})
SHARED = offline.TARGETS["sm_90"].shared_limit


def _content(**changes: Any) -> dict[str, Any]:
    return {"timed": True, **tuned.identity(GPU), "tiles": [ENTRY], **changes}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "tiles.json"
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    tuned._table.cache_clear()
    yield path
    tuned._table.cache_clear()


def test_a_launch_takes_the_tuned_tile(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table.write_text(json.dumps(_content()))
    monkeypatch.setattr(tuned, "target", lambda device: "sm_90")
    monkeypatch.setattr(tuned, "device_name", lambda device: GPU)
    x = torch.empty(1, dtype=torch.bfloat16)
    tiles = {("sm_90", 16): OWN, ("other", 16): OWN, ("other", 32): OWN}
    assert tuned.tile_entry(tiles, x, "linear", *KEY[2]) == TILE
    assert tuned.tile_entry(tiles, x, "linear", 64, *KEY[2][1:]) == OWN  # another batch
    assert tuned.tile_entry(tiles, x, "linear update", *KEY[2]) == OWN
    assert tuned.tile_entry(tiles, x.half(), "linear", *KEY[2]) == OWN
    monkeypatch.setattr(tuned, "device_name", lambda device: None)  # launches are recorded
    assert tuned.tile_entry(tiles, x, "linear", *KEY[2]) == OWN


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
        assert tuned.tuned_tile(KEY, OWN, GPU) == OWN
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.tuned_tile(KEY, OWN, GPU) == OWN  # says so once


def test_a_damaged_table_is_ignored(table: Path) -> None:
    table.write_text(json.dumps(_content())[:40])
    with pytest.warns(UserWarning, match="is not used"):
        assert tuned.tuned_tile(KEY, OWN, GPU) == OWN


def test_without_a_table_nothing_is_said(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(tuned.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.tuned_tile(KEY, OWN, GPU) == OWN
    tuned._table.cache_clear()
    path = tmp_path / "fastalex" / "tiles_nvidia-test-gpu.json"
    path.parent.mkdir()
    path.write_text(json.dumps(_content()))
    assert tuned.tuned_tile(KEY, OWN, GPU) == TILE


def _problem(*seconds: float | None) -> Problem:
    candidates = [Candidate((64, 64, 32, 4, i + 1), seconds=s) for i, s in enumerate(seconds)]
    return Problem("conv2", "forward", KEY, candidates)


def test_the_tables_own_tile_stays_unless_another_is_clearly_faster() -> None:
    for seconds, chosen in (((1.0, 0.98), 0), ((1.0, 0.9, 0.8), 2), ((1.0, None), 0)):
        problem = _problem(*seconds)
        assert problem.best() is problem.candidates[chosen]
    problem = _problem(1.0, 0.5)
    problem.candidates[1].skipped = "spills"
    assert problem.best() is problem.own
    assert problem.entry()["skipped"] == [{"tile": [64, 64, 32, 4, 2], "why": "spills"}]
    problem.candidates[0].skipped, problem.candidates[1].skipped = "spills", None
    assert problem.best() is problem.candidates[1]


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
        assert len(tile) == len(tuned.FIELDS[kernel])
        assert min(tile) >= 1
        assert allowed(*tile), tile


def _found(
    gpus: int,
    limit: int,
    monkeypatch: pytest.MonkeyPatch,
    *names: str,
    dtype: torch.dtype = torch.bfloat16,
) -> Search:
    """The paper's net on an H100, without compiling anything."""
    monkeypatch.setattr(sweep, "compile_all", lambda jobs, target: itertools.repeat(None))
    with record_launches("sm_90", lambda *_: None):
        step = WatchedStep("paper", 128, dtype, None, gpus, "meta")
    calls = [call for call in step.calls if not names or call.layer in names]
    return Search(calls, "sm_90", limit)


@pytest.mark.parametrize("gpus", [1, 2])
def test_what_a_training_step_looks_up_is_tuned(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: dict[tuned.Key, tuned.Tile] = {}
    with tuned.choosing(lambda key, own: looked_up.setdefault(key, own)):
        record_step("sm_90", 128, towers=gpus)
    problems = {problem.key: problem for problem in _found(gpus, 2, monkeypatch)}
    absent = {"linear half parts"} if gpus == 1 else set()  # a tower begins with a half
    assert {key[0] for key in looked_up} == set(tuned.FIELDS) - absent
    for key, own in looked_up.items():
        assert len(own) == len(tuned.FIELDS[key[0]])
        if not (follows_tile(key) and key not in problems):
            assert problems[key].own.tile == own
            assert len(problems[key].candidates) == 2
    # A reduction of a few steps is no problem: left are the weights of convolutions and fc layers.
    steps = [key[2][-1] for key in problems if follows_tile(key)]
    assert len(steps) == 11
    assert min(steps) >= 8


def test_in_float16_what_autograd_launches_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training in float16 scales its loss, so gradients are stored, products of their own."""
    keys = [problem.key for problem in _found(1, 2, monkeypatch, "fc8", dtype=torch.float16)]
    assert {kind for _, kind, _ in keys} == {"float16"}
    products = [sizes[:3] for kernel, _, sizes in keys if kernel == "linear"]
    assert products == [(128, 1000, 4096), (128, 4096, 1000), (1000, 4096, 128)]
    assert {kernel for kernel, *_ in keys} == {"linear", "linear parts"}


def test_what_launches_nothing_is_no_problem() -> None:
    """A tower asks whether halves of a product gain, and in the interpreter they do not."""
    with kernels.backend("interpreter"), record_launches("interpreter", lambda *_: None):
        step = WatchedStep(narrow("paper"), 1, torch.float32, 36, 2, "meta")
        found = list(Search([c for c in step.calls if c.layer == "fc6"], "interpreter", 2))
    kinds = [(problem.phase, problem.key[0]) for problem in found]
    assert kinds == [("forward", "linear"), ("backward", "linear"), ("backward", "linear update")]
    assert all(candidate.launches for problem in found for candidate in problem.candidates)


def test_tiles_are_settled_before_the_parts_that_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the end a table holds the parts of the tile that it holds."""
    found = []
    for problem in _found(1, 9, monkeypatch, "fc8"):
        for i, candidate in enumerate(problem.candidates):
            candidate.seconds = 1.0 / (i + 1)  # the last is the fastest
        found.append(problem)
    kinds = [problem.key[0] for problem in found]
    assert kinds == ["linear", "linear", "linear update", "linear parts", "linear parts"]
    tiles = {problem.key: problem.best().tile for problem in found}
    assert any(p.own.tile[:2] != tiles[p.key][:2] for p in found[:2])
    for problem in found[3:]:
        (m, n, *_), (rows, columns) = tiles["linear", "bfloat16", problem.key[2][:5]], (128, 0)
        columns = problem.key[2][1]
        assert problem.key[2][5] == -(-rows // m) * -(-columns // n)
        for candidate in problem.candidates:
            product, *finish = candidate.launches
            assert product.named["BLOCK_N"] == n
            assert product.named["SPLIT"] == product.grid[2] == candidate.tile[0]  # type: ignore[index]
            assert len(finish) == (candidate.tile != (1,))


def test_nothing_starts_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    search = _found(1, 2, monkeypatch, "fc8")
    done = []
    for problem in search:
        done.append(problem.key[0])
        search._deadline = 0.0
    assert done == ["linear"]
    assert len(search.found) == 3


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
    monkeypatch.setattr(sweep, "inspect", lambda *_: [row])
    problem = Problem("pool1", "forward", KEY, [Candidate((8, 4), launches=[LAUNCH])])
    gpu = GPUS["h100"]
    for seconds, score in ((4e-6, 0.25), (5e-7, 1.0), (None, None)):
        row.issue_seconds, problem.own.score = seconds, None
        sweep.rank(problem, None, gpu, "bf16")  # type: ignore[arg-type]
        assert problem.own.score == (score and pytest.approx(score))  # 3 MB take 1 us


def test_a_candidate_that_spills_or_fails_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes = [(3, 16, 0), (0, 0, SHARED + 1), (0, 0, SHARED), RuntimeError("no such layout\nmore")]

    def compile_launch(launch: Launch, target: str) -> Any:
        code = codes[launch.options["number"]]
        if isinstance(code, Exception):
            raise code
        return SimpleNamespace(**dict(zip(("spills", "stack", "shared"), code, strict=True)))

    monkeypatch.setattr(offline, "compile_launch", compile_launch)
    monkeypatch.setattr(offline, "read", lambda compiled: compiled)
    jobs = [[replace(LAUNCH, options={"number": i})] for i in range(4)]
    spills, large, right, failing = sweep.compile_all([*jobs], "sm_90")
    assert spills == "_probe spills (3 instructions, 16 bytes)"
    assert large == f"_probe needs {SHARED + 1} bytes of shared memory, there are {SHARED}"
    assert right is None
    assert failing == "RuntimeError: no such layout"


class Costs:
    """A clock that advances with the rows of a pooling program, as ``cost`` has it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.rows = 0.0, set[int]()
        self.cost: Callable[[int], float] = float
        self.wrong: int | None = None  # rows of a program whose result is 1% too large
        run = launch.run

        def watched(kernel: Any, grid: Any, args: Any, kwargs: Any) -> Any:
            result = run(kernel, grid, args, kwargs)
            named = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
            if "pool" in kernel.fn.__name__:
                rows = named["BLOCK_M"]
                self.rows.add(rows)
                self.now += self.cost(rows)
                if rows == self.wrong:
                    named["y_ptr" if "fwd" in kernel.fn.__name__ else "dx_ptr"].mul_(1.01)
            return result

        monkeypatch.setattr(launch, "run", watched)

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def small_step() -> WatchedStep:
    with kernels.backend("interpreter"):
        return WatchedStep(narrow("paper"), 1, torch.float32, 36, 1, "cpu")


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_wrong_candidate_is_refused_and_a_slow_one_loses(
    phase: str, small_step: WatchedStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    (call,) = (c for c in small_step.calls if (c.layer, c.phase) == ("pool5", phase))
    costs = Costs(monkeypatch)

    def tuned(*rows: int) -> Problem:
        with kernels.backend("interpreter"):
            ((key, own),) = call.again({}).own.items()
            problem = Problem("pool5", phase, key, [Candidate((n, own[1])) for n in rows])
            sweep.time_candidates(problem, call, {}, costs, 2)
        return problem

    assert tuned(4, 8, 2).best().tile[0] == 2
    assert tuned(2, 4, 8).best().tile[0] == 2
    costs.wrong = 2
    problem = tuned(4, 8, 2)
    assert problem.best().tile[0] == 4
    assert problem.candidates[2].skipped is not None
    assert "a result is 1.0e-02 away" in problem.candidates[2].skipped
    assert problem.candidates[2].seconds is None


def test_what_an_update_does_is_checked_and_undone(
    small_step: WatchedStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A candidate that gets the momentum buffer wrong is refused, and nothing is trained."""
    (call,) = (c for c in small_step.calls if (c.layer, c.phase) == ("fc8", "backward"))
    before = [x.clone() for x in call.changed()]
    run = launch.run

    def wrong(kernel: Any, grid: Any, args: Any, kwargs: Any) -> Any:
        run(kernel, grid, args, kwargs)
        named = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        if named.get("BLOCK_M") == 32 and "v_ptr" in named:
            named["v_ptr"].mul_(1.01)

    monkeypatch.setattr(launch, "run", wrong)
    with kernels.backend("interpreter"):
        key, own = next(x for x in call.again({}).own.items() if x[0][0] == "linear update")
        tiles = [own, (32, 64, 16, 4, 1), (64, 64, 16, 4, 1)]
        problem = Problem("fc8", "backward", key, [Candidate(tile) for tile in tiles])
        for x, value in zip(call.changed(), before, strict=True):
            x.copy_(value)
        sweep.time_candidates(problem, call, {}, iter(range(99)).__next__, 1)
    assert [c.skipped is None for c in problem.candidates] == [True, False, True]
    for x, value in zip(call.changed(), before, strict=True):
        assert torch.equal(x, value)


SWEEP = ["--dry-run", "--batch-size", "1", "--image-size", "36", "--dtype", "fp32"]


@pytest.fixture
def narrow_net(small_step: WatchedStep, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command tunes ``small_step``."""
    monkeypatch.setitem(VARIANTS, "paper", narrow("paper"))

    def step(*arguments: Any) -> WatchedStep:
        return WatchedStep(*arguments) if arguments[-1] == "meta" else small_step

    monkeypatch.setattr(tune, "WatchedStep", step)


@pytest.mark.usefixtures("narrow_net")
def test_a_table_is_written_and_used_by_the_step(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = Costs(monkeypatch)
    costs.cost = lambda rows: 1.0 / rows  # the largest program is the fastest
    monkeypatch.setattr(tune, "clock_of", lambda device: costs)
    with kernels.backend("interpreter"):
        assert tune.main([*SWEEP, "--layer", "pool5"]) == 0
        assert f"table {table}" in capsys.readouterr().out
        entries = {e["pass"]: e for e in json.loads(table.read_text())["tiles"]}
        step = _step()
        step(torch.randn(1, 3, 36, 36), torch.tensor([3]))
        used = {x.phase: x.named["BLOCK_M"] for x in step.launches if x.layer == "pool5" and x.grid}
    for phase in ("forward", "backward"):
        entry = entries[phase]
        assert entry["tile"][0] == max(t["tile"][0] for t in entry["tried"])
        assert entry["us"] == min(t["us"] for t in entry["tried"])
        assert used[phase] == entry["tile"][0]
    assert any(entry["tile"] != entry["own tile"] for entry in entries.values())


def _step() -> TrainStep:
    model = AlexNet(variant="paper")
    return TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.0))


@pytest.mark.usefixtures("narrow_net")
def test_an_interrupted_sweep_keeps_what_it_had(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([0.0, 2.0, 2.0, 3.0])  # of the first problem, which has two candidates

    def clock() -> float:
        for now in times:
            return now
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "clock_of", lambda device: clock)
    with kernels.backend("interpreter"):
        assert tune.main([*SWEEP, "--layer", "pool5"]) == 130
    assert capsys.readouterr().err.endswith(f"interrupted, 1 of 2 problems are in {table}\n")
    (found,) = tuned.read_table(table, "interpreter").items()
    assert found[0][0] == "pool forward"
    (entry,) = json.loads(table.read_text())["tiles"]
    assert (entry["own us"], entry["us"]) == (2e6, 1e6)


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
