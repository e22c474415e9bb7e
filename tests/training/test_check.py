"""The first-use check, with kernels that were made wrong, under the interpreter."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastalex_kernels as kernels
from fastalex import AlexNet
from fastalex.common import timing
from fastalex.distributed.exchange import LoopbackExchange
from fastalex.distributed.towers import cut_to_tower
from fastalex.model.variants import Convolution, FullyConnected, ResponseNorm, Variant
from fastalex.training import TrainStep, check, layer_check, passes, train, updates
from fastalex.training.layer_check import slice_error
from fastalex.training.optim import build_optimizer
from fastalex.training.step import Tricks
from fastalex_kernels.common.launch import call
from fastalex_kernels.conv2d import forward as conv2d
from fastalex_kernels.linear import backward as one_pass
from fastalex_kernels.linear import update as linear
from fastalex_kernels.lrn_pool import general as pool
from fastalex_kernels.reference import relative_error, tolerance
from tests._nets import narrow

from .test_step import bare

pytestmark = pytest.mark.interpreted

CLASSES, BATCH, SIDE = 10, 2, 43
NORM = ResponseNorm(2.0, 5e-4, groups=2)
SMALL = Variant(
    "small",
    (
        Convolution(16, 11, stride=4, weight_std=None, pool=True),
        Convolution(32, 3, padding=1, groups=2, weight_std=None, pool=True),
    ),
    (FullyConnected(32, None), FullyConnected(None, None)),
)
NORMALISED = replace(
    SMALL, convolutions=(replace(SMALL.convolutions[0], norm=NORM), *SMALL.convolutions[1:])
)


@dataclass
class Run:
    """Losses of some steps, what was said, and what ran."""

    losses: list[float]
    said: list[str]
    step: TrainStep

    @property
    def on_aten(self) -> dict[str, str]:
        """What was said of each replaced part, by its name."""
        return {line.split()[0]: line for line in self.said if " runs on ATen, " in line}

    def launches(self, layer: str) -> list[str]:
        return [x.name for x in self.step.launches if x.layer == layer and x.grid is not None]


def run(
    variant: Variant = SMALL,
    backend: str = "interpreter",
    steps: int = 2,
    side: int = SIDE,
    narrow: bool = False,
    **tricks: Any,
) -> Run:
    model = AlexNet(CLASSES, variant=variant)
    model.init_parameters("he", torch.Generator().manual_seed(0))
    if variant.towers > 1:
        cut_to_tower(model, LoopbackExchange())
    said: list[str] = []
    with kernels.backend(backend):
        optimizer = build_optimizer(model, 0.01)
        if narrow:
            optimizer = build_optimizer(model, 0.01, rule="paper", momentum_dtype=torch.bfloat16)
        step = TrainStep(model, optimizer, tell=said.append, tricks=Tricks(**tricks))
        losses = []
        for number in range(steps):
            generator = torch.Generator().manual_seed(number)
            images = torch.randn(BATCH, 3, side, side, generator=generator)
            model.seed_dropout(3, number)
            losses.append(step(images, torch.arange(BATCH) + number).item())
    return Run(losses, said, step)


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FASTALEX_CHECK", "always")


@pytest.fixture(scope="module")
def clean() -> list[float]:
    """The losses without a planted fault, by torch's operators."""
    return run(backend="aten").losses


@pytest.fixture
def edit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Any, str, str, str], None]:
    """``edit(module, kernel, old, new)``: the kernel with ``new`` in place of ``old``."""

    def planted(module: Any, name: str, old: str, new: str) -> None:
        kernel = getattr(module, name)
        source = inspect.getsource(kernel.fn)
        assert source.count(old) == 1, source
        path = tmp_path / f"{name}.py"
        path.write_text(source.replace(old, new))
        names: dict[str, Any] = dict(vars(module))
        exec(compile(path.read_text(), str(path), "exec"), names)
        monkeypatch.setattr(module, name, names[name])

    return planted


@pytest.mark.slow
def test_right_kernels_stay(clean: list[float]) -> None:
    ours = run()
    assert ours.said == []
    assert ours.losses == pytest.approx(clean, rel=1e-6)
    assert {"conv1", "pool2", "fc4", "loss"} <= {x.layer for x in ours.step.launches if x.grid}
    cached = json.loads(check.Verdicts(torch.device("cpu")).path.read_text())
    assert len(cached["layers"]) == 7  # the loss, too
    for verdict in cached["layers"].values():
        assert verdict["wrong"] is None
        assert 0 <= verdict["error"] <= verdict["allowed"] < 2e-6


FAULTS: dict[str, tuple[Any, str, str, str, dict[str, str]]] = {
    "wrong tap": (
        conv2d, "_conv2d_relu_fwd_kernel", "((tap * H", "((tap // 2 * H",
        {"conv1": "forward: output", "conv2": "forward: output"},
    ),
    "dropped tail": (
        linear, "_linear_bwd_weight_update_kernel", "(offs_n < N)[None, :]",
        "(offs_n < N - 1)[None, :]",
        {"fc4": "backward: weight"},
    ),
    "missing mask": (
        pool, "_lrn_max_pool2d_bwd_kernel", "tl.where(y <= 0, 0.0, dy)", "dy",
        {"pool1": "backward: gradient of the input", "pool2": "backward: gradient of the input"},
    ),
    "every program writes one place, the last one wins": (
        one_pass, "_linear_bwd_kernel", "tl.store(square_ptr + program", "tl.store(square_ptr",
        {"fc3": "backward: squared norm of the weight's gradient"},
    ),
    "does not compile": (
        linear, "_linear_bwd_weight_update_kernel", "scale * scale", "scale * scales",
        {"fc4": "NameError"},
    ),
    "another weight": (
        one_pass, "_linear_bwd_kernel", "w.to(dz.dtype), dx", "v.to(dz.dtype), dx",
        {"fc3": "backward: gradient of the input"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(name, marks=[] if name == "dropped tail" else [pytest.mark.slow])
        for name in FAULTS
    ],
)
def test_a_wrong_kernel_is_named_and_replaced(
    fault: str, clean: list[float], edit: Callable[..., None]
) -> None:
    module, kernel, old, new, layers = FAULTS[fault]
    edit(module, kernel, old, new)
    ours = run()
    assert ours.losses == pytest.approx(clean, rel=1e-6)
    assert set(ours.on_aten) == set(layers)
    for layer, why in layers.items():
        line = ours.on_aten[layer]
        assert why in line
        assert kernel in line
        assert "doctor --json" in line
        assert "\n" not in line
        assert ours.launches(layer) == []


@pytest.mark.slow
def test_narrow_momentum_is_checked_against_float64(edit: Callable[..., None]) -> None:
    assert run(narrow=True, steps=1).said == []
    # By less than the last place of the buffer.
    edit(one_pass, "_linear_bwd_kernel", "rounded(v, ", "rounded(v + 0.002 * v, ")
    edit(linear, "_linear_bwd_weight_update_kernel", "rounded(v, ", "rounded(0.998 * v, ")
    ours = run(narrow=True, steps=1)
    assert set(ours.on_aten) == {"fc3", "fc4"}
    for line in ours.on_aten.values():
        assert "backward: momentum of the weight" in line


@pytest.mark.slow
def test_a_race_shows_in_the_bits(clean: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = passes.matmul

    def racing(*args: Any, **options: Any) -> torch.Tensor:
        y = matmul(*args, **options)
        call(lambda: y.mul_(1 + 3e-7 * torch.randn(y.shape)))  # within every bound
        return y

    monkeypatch.setattr(passes, "matmul", racing)
    ours = run()
    assert set(ours.on_aten) == {"fc3", "fc4"}
    for line in ours.on_aten.values():
        assert "two runs on the same data differ, by _linear_relu_dropout_fwd_kernel" in line
    assert ours.losses == pytest.approx(clean, rel=1e-6)


@pytest.mark.slow
def test_stored_gradients_and_a_wrong_tower(clean: list[float], edit: Callable[..., None]) -> None:
    module, kernel, old, new, layers = FAULTS["wrong tap"]
    edit(module, kernel, old, new)
    assert set(run(fused_update=False).on_aten) == set(layers)


@pytest.mark.slow
@pytest.mark.parametrize(("early", "in_one_pass"), [(True, True), (False, False)])
def test_a_tower_of_two(
    early: bool,
    in_one_pass: bool,
    edit: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not in_one_pass:
        monkeypatch.setattr(updates, "fits", lambda *_: False)
    towers = replace(narrow("paper"), convolutions=bare("paper").convolutions)
    expected = run(towers, "aten", 1, side=67).losses
    assert run(towers, steps=1, side=67, early=early).said == []
    edit(linear, "_linear_bwd_weight_update_kernel", *FAULTS["dropped tail"][2:4])
    edit(one_pass, "_linear_bwd_kernel", *FAULTS["another weight"][2:4])
    ours = run(towers, steps=1, side=67, early=early)
    assert set(ours.on_aten) == {"fc6", "fc7", "fc8"}
    assert ours.losses == pytest.approx(expected, rel=1e-6)


class FakeClock:
    """Says that ATen takes twice as long as the kernels, but for some timings by number."""

    def __init__(self, faster: dict[int, float]) -> None:
        self.faster, self.calls = faster, 0
        self.now = 0.0

    def __call__(self) -> float:
        number, end = divmod(self.calls, 2)
        self.calls += 1
        if end:
            self.now += self.faster.get(number, 2.0 if number % 2 else 1.0)
        return self.now


def test_what_atens_kernels_do_faster_they_do(
    clean: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock({3: 0.97, 5: 0.5})  # pool1 within the margin, conv2 in half the time
    monkeypatch.setattr(check, "device_clock", lambda device: clock)
    monkeypatch.setattr(layer_check, "_ROUNDS", 1)
    monkeypatch.setattr(timing, "WARMUP", 0)
    ours = run(steps=1)
    assert ours.said == ["conv2 runs on ATen, which takes 500000 us here, its kernels 1000000"]
    assert ours.launches("conv2") == []
    assert "_lrn_max_pool2d_fwd_kernel" in ours.launches("pool1")
    assert ours.losses == pytest.approx(clean[:1], rel=1e-6)
    monkeypatch.setenv("FASTALEX_CHECK", "never")
    assert ours.losses == pytest.approx(run(steps=1).losses, rel=1e-6)
    verdict = layer_check.Verdict(ours=1.0, aten=0.5)
    assert verdict.uses == "aten"
    with kernels.backend("triton"):
        assert verdict.uses == "triton"


def test_a_verdict_without_gluons_kernel_is_not_one_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    one = passes.Pass()
    monkeypatch.delenv("FASTALEX_GLUON", raising=False)
    signature = check.signature("conv1", one, [128], torch.bfloat16)
    monkeypatch.setenv("FASTALEX_GLUON", "never")
    assert check.signature("conv1", one, [128], torch.bfloat16) != signature
    monkeypatch.setenv("FASTALEX_GLUON", "wait")
    assert check.signature("conv1", one, [128], torch.bfloat16) == signature


def test_a_verdict_is_kept_for_the_same_kernels_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(check, "check_parts", lambda *given: asked.append(given) or {})
    monkeypatch.setattr(check, "mode", lambda: "auto")
    cpu = torch.device("cpu")
    wrong = layer_check.Verdict(1.0, 1e-6, "forward: output is wrong, by _kernel")
    store = check.Verdicts(cpu)
    assert store.known == {}
    assert store.keep({"conv1 of a size": wrong}) == ""
    assert check.Verdicts(cpu).known == {"conv1 of a size": wrong}
    store.path.write_text(store.path.read_text().replace('"triton": "', '"triton": "0.'))
    assert check.Verdicts(cpu).known == {}  # of another Triton
    store.keep({"conv1 of a size": wrong})
    ptxas = store.path.with_name("ptxas")
    ptxas.write_text("#!/bin/sh\necho release 99.9\n")
    ptxas.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_PTXAS_PATH", str(ptxas))
        assert check.Verdicts(cpu).known == {}  # a kernel that failed to compile may run
    assert check.Verdicts(cpu).known == {"conv1 of a size": wrong}
    store.path.write_text("{")
    assert check.Verdicts(cpu).known == {}
    assert run(steps=1).said == []
    assert asked == []  # without a GPU nothing is checked unless asked for


def _products(dtype: torch.dtype, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a right kernel makes of random data, with a ReLU and rows of all sizes; and float64's.

    The products are exact, their sums float32's, rounded once at the store.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 576, generator=generator) * torch.logspace(-3, 1, rows)[:, None]
    w = torch.randn(576, columns, generator=generator) * torch.logspace(-2, 1, columns)
    x, w = x.to(dtype), w.to(dtype)
    out = (x.float() @ w.float()).relu().to(dtype)
    return out, (x.double() @ w.double()).relu()


def _pixel(out: torch.Tensor) -> None:
    out[7777] = out[7777].flip(0)


def _channel(out: torch.Tensor) -> None:
    out[:, 11] *= 0.5


def _stale_row(out: torch.Tensor) -> None:
    out[4001] = out[4000]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_wrong_pixel_channel_or_row_is_seen(dtype: torch.dtype) -> None:
    """Each is below the bound of the whole tensor in bfloat16, which right data are far below."""
    out, ref = _products(dtype, 10_000, 64)
    bound = tolerance(dtype, 576)
    allowed = bound * layer_check._SLICE.get(dtype, 1)
    assert relative_error(out, ref) < 0.5 * bound
    assert slice_error(out, ref) < 0.5 * allowed
    for plant in (_pixel, _channel, _stale_row):
        wrong = out.clone()
        plant(wrong)
        if dtype == torch.bfloat16:
            assert relative_error(wrong, ref) < bound, plant
        assert slice_error(wrong, ref) > 5 * allowed, plant
    out[5, 5] = torch.nan
    assert not slice_error(out, ref) <= allowed


def test_right_results_of_every_shape_are_no_alarm() -> None:
    """Maps, rows, a gradient with rows of zeros, a bias, and a loss."""
    generator = torch.Generator().manual_seed(1)
    for shape in ((5, 5, 8, 96), (128, 4096), (9, 3), (4096,), ()):
        ref = torch.randn(shape, dtype=torch.float64, generator=generator) ** 5
        ref = ref * (torch.rand(shape, generator=generator) > 0.9)
        for dtype in (torch.bfloat16, torch.float32):
            assert slice_error(ref.to(dtype), ref) <= tolerance(dtype, 0), shape
    assert slice_error(torch.zeros(3, 3), torch.zeros(3, 3)) == 0


@pytest.mark.parametrize(
    ("variable", "known"), [("CHECK", "always or never"), ("GLUON", "never or wait")]
)
def test_another_mode_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    known: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(f"FASTALEX_{variable}", "off")
    assert train.main([]) == 2
    said = f"train: error: FASTALEX_{variable}: expected {known}, got 'off'\n"
    assert capsys.readouterr().err == said


def test_the_first_layer_may_be_faster_on_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "device_clock", lambda device: clock)
    clock = FakeClock({1: 0.5})
    monkeypatch.setattr(layer_check, "_ROUNDS", 1)
    monkeypatch.setattr(timing, "WARMUP", 0)
    ours = run(steps=1)
    assert list(ours.on_aten) == ["conv1"]
    assert ours.step.uses_aten


def test_what_says_nothing_of_the_kernels_leaves_no_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Data that are not finite, and too little memory: the next start checks again."""
    expected = layer_check.in_float64

    def not_finite(*arguments: Any) -> Any:
        y, gradients = expected(*arguments)
        return y * torch.nan, gradients

    def too_large(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    said = []
    for fault in (not_finite, too_large, expected):
        with monkeypatch.context() as patch:
            patch.setattr(layer_check, "in_float64", fault)
            ours = run(steps=1)
        said.append(ours.said)
        assert ours.on_aten == {}
        assert check.Verdicts(torch.device("cpu")).path.exists() == (fault is expected)
    assert said == [
        ["the kernels are not checked now: conv1: a result is not finite in float64 either"],
        ["the kernels are not checked: that takes more memory than the GPU has left"],
        [],
    ]
