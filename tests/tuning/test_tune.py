"""Tuned tiles: how they are found, which table is believed, and what a launch makes of it."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastalex_kernels as kernels
from fastalex import AlexNet
from fastalex.common.compile import TARGETS, Compiled, compile_ahead
from fastalex.inspection.forecast import Estimate
from fastalex.inspection.gpus import GPUS
from fastalex.inspection.record import record_step
from fastalex.inspection.report import Row
from fastalex.model.layers import MaxPool2d
from fastalex.model.variants import VARIANTS
from fastalex.training import TrainStep
from fastalex.training.passes import Pool
from fastalex.tuning import sweep, tune
from fastalex.tuning.candidates import candidates, is_split
from fastalex.tuning.sweep import Config, Entry, autotune
from fastalex.tuning.workloads import Recorded, Workload, record_workloads
from fastalex_kernels.common import launch, tuned
from fastalex_kernels.common.backend import record_launches
from fastalex_kernels.common.program import Launch
from tests._nets import narrow

GPU = "NVIDIA Test GPU"
KEY = ("linear", "bfloat16", (128, 4096, 9216, 0, 1))
TILE = (128, 128, 64, 8, 3)
OWN = (128, 64, 64, 4, 4)


ENTRY = {"kernel": KEY[0], "kind": KEY[1], "sizes": list(KEY[2]), "tile": list(TILE)}
LAUNCH = Launch("fc8", "forward", print, (1,), [], {})
OPS = tuned.identity(GPU)["kernels"]
DONE = Compiled(None, 0.0)
SHARED = TARGETS["sm_90"].shared_limit


def _content(**changes: Any) -> dict[str, Any]:
    return {"timed": True, **tuned.identity(GPU), "tiles": [ENTRY], **changes}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "tiles.json"
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    monkeypatch.setattr(tuned, "device_name", lambda device: GPU)
    tuned._table.cache_clear()
    yield path
    tuned._table.cache_clear()


def _tile() -> tuned.Tile:
    """What a launch takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuned, "device_name", lambda device: GPU)
        return tuned.tuned(OWN, torch.empty(1, dtype=torch.bfloat16), "linear", *KEY[2])


def test_a_launch_takes_the_tuned_tile(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table.write_text(json.dumps(_content()))
    monkeypatch.setattr(tuned, "target", lambda device: "sm_90")
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
        ({"kernels": dict.fromkeys(OPS, "0")}, "run python -m fastalex.tune"),
        ({"triton": "2.0.0"}, "it is of triton 2.0.0"),
        ({"timed": False}, "it was computed, not timed"),
        ({"tiles": [{"kernel": "linear"}]}, "no table of fastalex.tune"),
        ({"tiles": 3}, "no table of fastalex.tune"),
        ({"tiles": [ENTRY | {"tile": [128, 128, 64, 8]}]}, "for a tile of linear"),
        ({"tiles": [ENTRY | {"tile": [128, 128, 0, 8, 3]}]}, "for a tile of linear"),
        ({"tiles": [ENTRY | {"kernel": "linear parts"}]}, "for a tile of linear parts"),
        ({"tiles": [ENTRY | {"tile": None}]}, "no table of fastalex.tune"),
        ({"tiles": [ENTRY | {"kernel": ["linear"]}]}, "no table of fastalex.tune"),
        ({"tiles": [ENTRY | {"kernel": "attention"}]}, "for a tile of attention"),
        ({"tiles": [ENTRY | {"kernel": "attention", "tile": []}]}, "for a tile of attention"),
        (None, "is not used"),  # damaged
    ],
)
def test_a_table_of_something_else_is_ignored(
    table: Path, changes: dict[str, Any] | None, why: str
) -> None:
    text = json.dumps(_content(**changes or {}))
    table.write_text(text if changes else text[:40])
    with pytest.warns(UserWarning, match=why):
        assert _tile() == OWN
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _tile() == OWN  # says so once


def test_a_tile_of_changed_kernels_is_not_taken(table: Path) -> None:
    """Those of other ops still are."""
    table.write_text(json.dumps(_content(kernels=OPS | {"conv2d": "0"})))
    assert _tile() == TILE
    table.write_text(json.dumps(_content(kernels=OPS | {"linear": "0"})))
    tuned._table.cache_clear()
    assert _tile() == OWN


def test_without_a_table_nothing_is_said(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(tuned.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _tile() == OWN
    tuned._table.cache_clear()
    path = tmp_path / "fastalex" / "tiles_nvidia-test-gpu.json"
    path.parent.mkdir()
    path.write_text(json.dumps(_content()))
    assert _tile() == TILE


def _entry(*us: float | None) -> Entry:
    configs = [Config((64, 64, 32, 4, i + 1), us=each) for i, each in enumerate(us)]
    return Entry("conv2", "forward", KEY, configs)


@pytest.mark.parametrize(
    ("us", "chosen"), [((1.0, 0.98), 0), ((1.0, 0.9, 0.8), 2), ((1.0, None), 0)]
)
def test_the_own_config_stays_unless_another_is_clearly_faster(
    us: tuple[float | None, ...], chosen: int
) -> None:
    entry = _entry(*us)
    assert entry.best() is entry.configs[chosen]


def test_a_skipped_config_is_not_the_best() -> None:
    entry = _entry(1.0, 0.5)
    entry.configs[1].skipped = "spills"
    assert entry.best() is entry.own
    assert entry.as_row()["skipped"] == [{"tile": [64, 64, 32, 4, 2], "why": "spills"}]
    entry.configs[0].skipped, entry.configs[1].skipped = "spills", None
    assert entry.best() is entry.configs[1]


@pytest.mark.parametrize(
    ("kernel", "bits", "most"),
    [("linear", 16, 128), ("linear", 32, 128), ("conv2d forward", 16, 192)],
)
def test_candidates_fit_and_none_comes_twice(kernel: str, bits: int, most: int) -> None:
    for shared in (99 << 10, 227 << 10):
        own, *others = candidates((kernel, *KEY[1:]), OWN, bits, shared)
        assert own == OWN
        assert len(set(others)) == len(others) > 8
        for m, n, k, warps, stages in others:
            assert stages * (m + n) * k * bits // 8 <= shared
            assert 8 <= m * n / (32 * warps) <= most  # sums in a thread's registers


def test_no_candidate_holds_more_sums_than_registers() -> None:
    """192 outputs come as 128 + 64 columns, which three pixels have no room for."""
    for outputs, rows in ((128, {128, 256, 384}), (192, {128, 256})):
        key = ("conv2d forward", "bfloat16", (128, 13, 13, 192, outputs, 3, 3, 2))
        tiles = [tile for tile in candidates(key, OWN, 16, 227 << 10) if tile[1] == 128]
        assert {tile[0] for tile in tiles if tile[0] >= 128} == rows


@pytest.mark.parametrize(
    ("kernel", "sizes", "own", "allowed"),
    [
        ("linear parts", (128, 64), (4,), lambda parts: parts <= 16),  # of 4 steps and more
        ("conv2d weight parts", (5, 40), (1,), lambda parts: parts <= 10),
        ("lrn forward", (128, 27, 27, 13, 13, 256, 2), (128, 3, 5), lambda t, s, r: r <= 13),
        # A program holds whole groups: of 96 chunks here.
        ("lrn backward", (128, 27, 27, 13, 13, 768, 1), (128, 14), lambda t, r: t >= 96),
        ("pool forward", (128, 13, 13, 6, 6, 256, 1, 3, 2, 0), (1, 1), lambda m, warps: m >= 1),
        ("conv2d run", (128, 27, 27, 128, 48, 5, 5, 2), (4,), lambda pixels: pixels < 4),
        # A product has 64 rows, or more, and a pipeline two stages.
        ("linear backward", (128, 4096, 9216), (64, 32, 8, 2), lambda n, k, w, s: n > 63 and s > 1),
    ],
)
def test_few_candidates_beside_products(
    kernel: str, sizes: tuple[int, ...], own: tuple[int, ...], allowed: Any
) -> None:
    first, *others = dict.fromkeys(candidates((kernel, "bfloat16", sizes), own, 16, 0))
    assert first == own
    assert 1 <= len(others) <= 4
    for tile in others:
        assert len(tile) == len(tuned.FIELDS[kernel])
        assert min(tile) >= 1
        assert allowed(*tile), tile


Measure = Callable[[Entry, dict[tuned.Key, tuned.Tile]], None]


def _tuned(
    gpus: int,
    limit: int,
    monkeypatch: pytest.MonkeyPatch,
    *names: str,
    dtype: torch.dtype = torch.bfloat16,
    measure: Measure = lambda entry, best: None,
    target: str = "sm_90",
) -> list[Entry]:
    """The paper's net on a GPU, without compiling anything."""
    monkeypatch.setattr(sweep, "compile_ahead", lambda *_: itertools.repeat(DONE))
    with record_launches(target, lambda *_: None):
        step = record_workloads("paper", 128, dtype, None, gpus, "meta")
    workloads = [w for w in step.workloads if not names or w.layer in names]
    return list(autotune(workloads, target, limit, measure))


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [1, 2])
def test_what_a_training_step_looks_up_is_tuned(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: dict[tuned.Key, tuned.Tile] = {}
    with tuned.choosing(lambda key, own: looked_up.setdefault(key, own)):
        record_step("sm_90", 128, towers=gpus)
    entries = {entry.key: entry for entry in _tuned(gpus, 2, monkeypatch)}
    # A tower begins with a half, and sends one before it updates the weight.
    absent = {"linear half parts", "linear update"} if gpus == 1 else set()
    assert {key[0] for key in looked_up} == set(tuned.FIELDS) - absent
    for key, own in looked_up.items():
        assert len(own) == len(tuned.FIELDS[key[0]])
        if not (is_split(key) and key not in entries):
            assert entries[key].own.tile == own
            assert len(entries[key].configs) == 2
    # A reduction of a few steps is not split: left are weights of convolutions and fc layers.
    steps = [key[2][-1] for key in entries if is_split(key)]
    assert len(steps) == {1: 8, 2: 10}[gpus]
    assert min(steps) >= 8


def test_in_float16_what_autograd_launches_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training in float16 scales its loss, so gradients are stored, products of their own."""
    keys = [entry.key for entry in _tuned(1, 2, monkeypatch, "fc8", dtype=torch.float16)]
    assert {kind for _, kind, _ in keys} == {"float16"}
    products = [sizes[:3] for kernel, _, sizes in keys if kernel == "linear"]
    assert products == [(128, 1000, 4096), (128, 4096, 1000), (1000, 4096, 128)]
    assert {kernel for kernel, *_ in keys} == {"linear", "linear parts"}


def test_what_launches_nothing_is_not_tuned() -> None:
    """A tower asks whether halves of a product gain, and in the interpreter they do not."""
    with kernels.backend("interpreter"), record_launches("interpreter", lambda *_: None):
        step = record_workloads(narrow("paper"), 1, torch.float32, 36, 2, "meta")
        workloads = [w for w in step.workloads if w.layer == "fc6"]
        found = list(autotune(workloads, "interpreter", 2, lambda *_: None))
    kinds = [(entry.phase, entry.key[0]) for entry in found]
    assert kinds == [("forward", "linear"), ("backward", "linear"), ("backward", "linear update")]
    assert all(config.launches for entry in found for config in entry.configs)


def test_splits_follow_from_the_best_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the end a table holds the splits of the tile that it holds."""

    def measure(entry: Entry, best: dict[tuned.Key, tuned.Tile]) -> None:
        for i, config in enumerate(entry.configs):
            config.us = 1.0 / (i + 1)  # the last is the fastest

    found = _tuned(1, 9, monkeypatch, "fc8", measure=measure, target="sm_80")
    kinds = [entry.key[0] for entry in found]
    assert kinds == ["linear", "linear", "linear update", "linear parts", "linear parts"]
    tiles = {entry.key: entry.best().tile for entry in found}
    assert any(e.own.tile[:2] != tiles[e.key][:2] for e in found[:2])
    for entry in found[3:]:
        (m, n, *_) = tiles["linear", "bfloat16", entry.key[2][:5]]
        assert entry.key[2][5] == -(-128 // m) * -(-entry.key[2][1] // n)
        for config in entry.configs:
            product, *finish = config.launches
            assert product.named["BLOCK_N"] == n
            assert product.named["SPLIT"] == product.grid[2] == config.tile[0]  # type: ignore[index]
            assert len(finish) == (config.tile != (1,))


def test_a_config_s_launches_are_estimated_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row("fc8", "forward", "kernel", estimate=Estimate(1e-6, middle, 9e-6, "L2"))
            for middle in (2e-6, 3e-6)]  # fmt: skip
    monkeypatch.setattr(sweep, "inspect", lambda *_: rows)
    entry = Entry("fc8", "forward", KEY, [Config((8, 4), launches=[LAUNCH])])
    sweep.rank(entry, None, GPUS["h100"], "bf16")  # type: ignore[arg-type]
    assert entry.own.us == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ((3, 16, 0), "print spills (3 instructions, 16 bytes)"),
        (
            (0, 0, SHARED + 1),
            f"print needs {SHARED + 1} bytes of shared memory, there are {SHARED}",
        ),
        ((0, 0, SHARED), None),
        (RuntimeError("no such layout\nmore"), "RuntimeError: no such layout"),
    ],
)
def test_a_candidate_that_spills_or_fails_is_left_out(
    code: Any, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_launch(launch: Launch, target: str) -> Any:
        if isinstance(code, Exception):
            raise code
        return SimpleNamespace(**dict(zip(("spills", "stack", "shared"), code, strict=True)))

    monkeypatch.setattr(sweep, "compile_launch", compile_launch)
    monkeypatch.setattr(sweep.offline, "read", lambda compiled: compiled)
    compiled = compile_ahead([[LAUNCH], [LAUNCH]], "sm_90", sweep.unfit)
    assert [job.failure for job in compiled] == [why, why]


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
def small_step() -> Recorded:
    with kernels.backend("interpreter"):
        return record_workloads(narrow("paper"), 1, torch.float32, 36, 1, "cpu")


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_wrong_candidate_is_refused_and_a_slow_one_loses(
    phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, one = torch.randn(3, 3, 2, 16), Pool(MaxPool2d(3, 2))
    with kernels.backend("interpreter"):
        y = one.forward(x)
    given = (x,) if phase == "forward" else (torch.randn(y.shape), None)
    work = Workload("pool5", phase, one, given)
    costs = Costs(monkeypatch)

    def timed(*rows: int) -> Entry:
        with kernels.backend("interpreter"):
            ((key, own),) = work.run({}).own.items()
            entry = Entry("pool5", phase, key, [Config((n, own[1])) for n in rows])
            sweep.time_configs(entry, work, {}, costs, 1)
        return entry

    assert timed(4, 8, 2).best().tile[0] == 2
    costs.wrong = 2
    entry = timed(4, 8, 2)
    assert entry.best().tile[0] == 4
    assert entry.configs[2].skipped is not None
    assert "a result is 1.0e-02 away" in entry.configs[2].skipped
    assert entry.configs[2].us is None


@pytest.mark.slow
def test_what_an_update_does_is_checked_and_undone(
    small_step: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A candidate that gets the momentum buffer wrong is refused, and nothing is trained."""
    (work,) = (w for w in small_step.workloads if (w.layer, w.phase) == ("fc8", "backward"))
    before = [x.clone() for x in work.changed()]
    run = launch.run

    def wrong(kernel: Any, grid: Any, args: Any, kwargs: Any) -> Any:
        run(kernel, grid, args, kwargs)
        named = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        if named.get("BLOCK_N") == 32 and "v_ptr" in named:
            named["v_ptr"].base.mul_(1.01)

    monkeypatch.setattr(launch, "run", wrong)
    with kernels.backend("interpreter"):
        key, own = next(x for x in work.run({}).own.items() if x[0][0] == "linear backward")
        tiles = [own, (32, 64, 4, 1), (64, 64, 4, 1)]
        entry = Entry("fc8", "backward", key, [Config(tile) for tile in tiles])
        for x, value in zip(work.changed(), before, strict=True):
            x.copy_(value)
        sweep.time_configs(entry, work, {}, iter(range(99)).__next__, 1)
    assert [c.skipped is None for c in entry.configs] == [True, False, True]
    for x, value in zip(work.changed(), before, strict=True):
        assert torch.equal(x, value)


def _tune(path: Path) -> int:
    """The command on ``pool5``, as if the interpreter were a GPU."""
    small = ["--batch-size", "1", "--image-size", "36", "--dtype", "fp32", "--layer", "pool5"]
    options = tune._parser().parse_args(small)
    with kernels.backend("interpreter"):
        return tune.tune(options, torch.device("cpu"), "interpreter", path)


@pytest.fixture
def narrow_net(small_step: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command tunes ``small_step``."""
    monkeypatch.setitem(VARIANTS, "paper", narrow("paper"))

    def step(*arguments: Any) -> Recorded:
        return record_workloads(*arguments) if arguments[-1] == "meta" else small_step

    monkeypatch.setattr(tune, "record_workloads", step)
    monkeypatch.setattr(tune, "_ROUNDS", 1)


@pytest.mark.slow
@pytest.mark.usefixtures("narrow_net")
def test_a_table_is_written_and_used_by_the_step(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = Costs(monkeypatch)
    costs.cost = lambda rows: 1.0 / rows  # the largest program is the fastest
    monkeypatch.setattr(tuned, "device_name", lambda device: "interpreter")
    monkeypatch.setattr(tune, "clock_of", lambda device: costs)
    assert _tune(table) == 0
    assert f"table {table}" in capsys.readouterr().out
    with kernels.backend("interpreter"):
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


@pytest.mark.slow
@pytest.mark.usefixtures("narrow_net")
def test_an_interrupted_sweep_keeps_what_it_had(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0.0, 2.0, 2.0, 3.0])  # of the first key, which has two candidates

    def clock() -> float:
        for now in times:
            return now
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "clock_of", lambda device: clock)
    with pytest.raises(KeyboardInterrupt, match=f"^interrupted, 1 keys are in {table}$"):
        _tune(table)
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
