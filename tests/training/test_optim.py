"""Optimizers and schedules against the rules written out in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastalex import AlexNet
from fastalex.distributed.exchange import LoopbackExchange
from fastalex.distributed.towers import cut_to_tower, first_elements
from fastalex.training.autograd_step import LossScaler
from fastalex.training.config import Settings
from fastalex.training.optim import (
    PaperSGD,
    Rates,
    build_optimizer,
    gradient_norms,
    momentum_buffers,
    set_learning_rate,
    set_momentum_buffers,
)
from fastalex.training.options import parse_arguments
from fastalex.training.schedule import Schedule
from tests._nets import narrow

NAMES = ["classifier.6.weight", "classifier.6.bias"]
RATES = [0.5, 0.5, 0.05, 0.05]  # a drop in the middle


@pytest.fixture(scope="module")
def nets() -> dict[str, AlexNet]:
    return {name: AlexNet(2, variant=narrow(name)) for name in ("paper", "source2012", "caffe")}


def _by_hand(
    rule: str, w: Any, gradients: list[Any], rates: list[float], momentum: float, decay: float
) -> Any:
    v = np.zeros_like(w)
    for lr, g in zip(rates, gradients, strict=True):
        if rule == "paper":
            v = momentum * v - decay * lr * w - lr * g
            w = w + v
        else:
            v = momentum * v + g + decay * w
            w = w - lr * v
    return w


@pytest.mark.parametrize("rule", ["paper", "torch"])
@pytest.mark.parametrize(
    ("variant", "bias_rate", "bias_decay"), [("paper", 1, 1), ("caffe", 2, 0), ("source2012", 2, 0)]
)
def test_steps_across_a_drop_are_those_by_hand(
    nets: dict[str, AlexNet], rule: str, variant: str, bias_rate: float, bias_decay: float
) -> None:
    random = np.random.default_rng(0)
    model = nets[variant]
    model.zero_grad()
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameters[name].shape) for name in NAMES}
    begin = {name: random.normal(size=shapes[name]) for name in NAMES}
    gradients = {name: [random.normal(size=shapes[name]) for _ in RATES] for name in NAMES}
    for name in NAMES:
        parameters[name].data.copy_(torch.from_numpy(begin[name]))
    optimizer = build_optimizer(model, 0.5, 0.9, 0.01, rule)
    for step, lr in enumerate(RATES):
        set_learning_rate(optimizer, lr)
        for name in NAMES:
            parameters[name].grad = torch.from_numpy(gradients[name][step]).float()
        optimizer.step()
    for name, rate, decay in zip(NAMES, (1.0, bias_rate), (1.0, bias_decay), strict=True):
        rates = [rate * lr for lr in RATES]
        expected = _by_hand(rule, begin[name], gradients[name], rates, 0.9, 0.01 * decay)
        other = {"paper": "torch", "torch": "paper"}[rule]
        wrong = _by_hand(other, begin[name], gradients[name], rates, 0.9, 0.01 * decay)
        # A few float32 roundings of numbers near 1.
        np.testing.assert_allclose(parameters[name].detach().numpy(), expected, 1e-5, 1e-5)
        assert np.abs(expected - wrong).max() > 1e-2


def test_biases_keep_their_rate_where_they_have_their_own(nets: dict[str, AlexNet]) -> None:
    optimizer = build_optimizer(nets["source2012"], 0.01, bias_lr=2.0, bias_schedule=False)
    set_learning_rate(optimizer, 1e-5)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-5, 0.02]


def test_rates_are_written_where_kernels_read_them_and_only_if_new(
    nets: dict[str, AlexNet],
) -> None:
    model = nets["caffe"]
    optimizer = build_optimizer(model, 0.5, 0.75, 0.25)
    rates = Rates(optimizer)
    held = [rates.of(p) for p in (model.features[0].weight, model.features[0].bias)]
    rates.follow()
    assert [rate.tolist() for rate in held] == [[0.5, 0.75, 0.25], [1.0, 0.75, 0.0]]
    versions = [rate._version for rate in held]
    rates.follow()
    assert [rate._version for rate in held] == versions
    set_learning_rate(optimizer, 0.125)
    rates.follow()
    assert [rate._version for rate in held] == [version + 1 for version in versions]
    optimizer.param_groups[0].update(lr=8.0, momentum=0.5)  # by hand
    rates.follow()
    assert [rate.tolist() for rate in held] == [[8.0, 0.5, 0.25], [0.25, 0.75, 0.0]]


def test_every_parameter_is_trained_once(nets: dict[str, AlexNet]) -> None:
    model = nets["source2012"]
    trained = [p for group in build_optimizer(model, 0.1).param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in model.parameters()}
    assert len(trained) == len(list(model.parameters()))


@pytest.mark.parametrize(
    "arguments",
    [
        {"momentum": 1.0},
        {"rule": "nesterov"},
        {"lr": -1.0},
        {"weight_decay": -1.0},
        {"momentum_dtype": torch.float16, "rule": "paper"},
        {"momentum_dtype": torch.bfloat16},  # by torch's rule
    ],
)
def test_what_makes_no_sense_is_refused(
    nets: dict[str, AlexNet], arguments: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(arguments))}: "):
        build_optimizer(nets["paper"], **{"lr": 0.1, **arguments})


class Peer:
    """The mesh of two processes, of which the other found an overflow in some steps."""

    device = torch.device("cpu")

    def __init__(self, overflows: list[bool]) -> None:
        self.overflows = overflows

    def all_reduce_max(self, values: torch.Tensor) -> None:
        values.fill_(max(float(values), float(self.overflows.pop(0))))


@pytest.mark.parametrize("rule", ["paper", "torch"])
def test_a_step_that_overflows_anywhere_is_left_out_everywhere(
    nets: dict[str, AlexNet], rule: str
) -> None:
    model = nets["paper"]
    optimizer = build_optimizer(model, 0.5, rule=rule)
    scaler = LossScaler(Peer([True, False]), enabled=True)  # type: ignore[arg-type]
    weight = model.classifier[6].weight
    before, scale = weight.detach().clone(), scaler.get_scale()
    for moved in (False, True):
        optimizer.zero_grad()
        scaler.scale(weight.sum()).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weight, before) is not moved
        assert bool(torch.isfinite(weight).all())
    assert scaler.get_scale() == scale / 2
    # The first step came second, and is the first all the same: v = g + wd w.
    expected = before - 0.5 * (1 + 5e-4 * before)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


class HostReads(TorchDispatchMode):
    """Counts values that the host reads from tensors, as ``item`` and ``bool`` do."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("unscaled", [True, False])
def test_the_host_does_not_look_for_overflows(unscaled: bool) -> None:
    """GradScaler's step by the paper's rule: as without one, or without any change at all."""
    weight = torch.tensor([1.0, -2.0], requires_grad=True)
    other = weight.detach().clone().requires_grad_()
    optimizer, plain = (PaperSGD([w], 0.5, 0.75, 0.25) for w in (weight, other))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for gradient in ([0.5, 0.25], [math.inf, 1.0], [2.0, -1.0]):
        scaler.scale(weight @ torch.tensor(gradient)).backward()
        with HostReads() as reads:
            if unscaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
        assert reads.count == 0
        scaler.update()
        optimizer.zero_grad()
        if math.isfinite(gradient[0]):
            other.grad = torch.tensor(gradient)
            plain.step()
        assert torch.equal(weight, other)
        assert torch.equal(
            *(o.state[w]["momentum_buffer"] for o, w in ((optimizer, weight), (plain, other)))
        )


def test_narrow_velocities_follow_those_of_float32_on_average() -> None:
    """Gradients that rounding to nearest would lose, beside a velocity 2000 times as large."""
    weight, narrow = (torch.zeros(64, 64, requires_grad=True) for _ in range(2))
    bias = torch.zeros(64, requires_grad=True)
    wide = PaperSGD([weight], 1.0, 0.999)
    rounded = PaperSGD([narrow, bias], 1.0, 0.999, momentum_dtype=torch.bfloat16, seed=3)
    wide.state[weight]["momentum_buffer"] = torch.ones(64, 64)
    rounded.state[narrow]["momentum_buffer"] = torch.ones(64, 64).bfloat16()
    bias.grad = torch.ones(64)
    for _ in range(200):
        weight.grad = narrow.grad = torch.full((64, 64), 5e-4)
        wide.step()
        rounded.step()
    v, mean = (o.state[w]["momentum_buffer"] for o, w in ((wide, weight), (rounded, narrow)))
    assert mean.dtype == torch.bfloat16
    assert rounded.state[bias]["momentum_buffer"].dtype == torch.float32
    error = float(mean.double().std()) / 64
    assert abs(float(mean.double().mean() - v.double().mean())) < 5 * error
    assert float(v.mean()) < 0.8  # to nearest, 1 - 0.0015 is 1


def test_groups_may_have_velocities_of_their_own_dtypes() -> None:
    dtypes = [torch.bfloat16, torch.float32]
    weights = [torch.nn.Parameter(torch.ones(4, 8)) for _ in dtypes]
    groups = [{"params": w, "momentum_dtype": d} for w, d in zip(weights, dtypes, strict=True)]
    optimizer = PaperSGD(groups, lr=0.1)
    for _ in range(3):
        for w in weights:
            w.grad = torch.ones_like(w)
        optimizer.step()
    for w, dtype in zip(weights, dtypes, strict=True):
        assert optimizer.state[w]["momentum_buffer"].dtype == dtype
        torch.testing.assert_close(w.detach(), torch.full_like(w, 0.439), rtol=0.02, atol=0)
    assert Rates(optimizer).rng(weights[1]) is None
    with pytest.raises(ValueError, match="momentum_dtype"):
        PaperSGD([{"params": weights, "momentum_dtype": torch.float16}], lr=0.1)


@pytest.mark.parametrize("variant", ["paper", "paper-without-tower-traffic"])
def test_a_tower_knows_the_places_of_its_weights(variant: str) -> None:
    exchange = LoopbackExchange()
    exchange.rank = 1
    model = AlexNet(2, variant=narrow(variant))
    cut_to_tower(model, exchange)
    fc6, fc7, fc8 = first_elements(model).items()
    assert [place for _, place in (fc6, fc7)] == [(len(w), 0) for w, _ in (fc6, fc7)]
    assert fc8[1] == (0, fc8[0].shape[1])


def test_velocities_of_a_state_dict_keep_their_dtype() -> None:
    weight = torch.ones(2, 8, requires_grad=True)
    optimizer = PaperSGD([weight], 0.5, momentum_dtype=torch.bfloat16, seed=3)
    weight.grad = torch.ones(2, 8)
    optimizer.step()
    before = optimizer.state[weight]["momentum_buffer"].clone()
    again = PaperSGD([weight], 0.5)
    again.load_state_dict(optimizer.state_dict())
    assert again.state[weight]["momentum_buffer"].dtype == torch.bfloat16
    assert torch.equal(again.state[weight]["momentum_buffer"], before)
    assert [again.param_groups[0][name] for name in ("seed", "step")] == [3, 1]
    older = optimizer.state_dict()  # as a version before this one wrote it
    for name in ("momentum_dtype", "seed", "step", "places"):
        del older["param_groups"][0][name]
    plain = PaperSGD([weight], 0.5)
    plain.load_state_dict(older)
    plain.step()
    assert plain.state[weight]["momentum_buffer"].dtype == torch.float32


def test_momentum_buffers_come_back(nets: dict[str, AlexNet]) -> None:
    model = nets["paper"]
    optimizer = build_optimizer(model, 0.1)
    values = {n: torch.full_like(p, i) for i, (n, p) in enumerate(model.named_parameters())}
    set_momentum_buffers(model, optimizer, values)
    assert all(torch.equal(v, values[n]) for n, v in momentum_buffers(model, optimizer).items())


def _schedule(*arguments: str, steps: int) -> Schedule:
    return Schedule(Settings.choose(parse_arguments(arguments), "cpu"), steps)


def _rates(schedule: Schedule) -> list[float]:
    return [schedule.rate(step) for step in range(1, schedule.steps + 1)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], [1.0] * 8 + [0.1] * 2),
        (["--lr-drop", "1"], [1.0] * 10),
        (["--lr-drop", "3/10,0.5"], [1.0] * 3 + [0.1] * 2 + [0.01] * 5),
        (["--lr-drop", "1", "--warmup", "0.4"], [0.25, 0.5, 0.75, *[1.0] * 7]),
    ],
)
def test_rates_of_a_run_of_ten_steps(arguments: list[str], expected: list[float]) -> None:
    assert _rates(_schedule("--lr", "1", *arguments, steps=10)) == pytest.approx(expected)


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 10_010])
def test_the_published_epochs_of_net_145(steps_per_epoch: int) -> None:
    schedule = _schedule("--recipe", "source2012", steps=90 * steps_per_epoch)
    for drops, epoch in enumerate((25, 51, 79)):
        last = epoch * steps_per_epoch
        assert schedule.rate(last) == pytest.approx(0.01 * 0.1**drops)
        assert schedule.rate(last + 1) == pytest.approx(0.01 * 0.1 ** (drops + 1))


def test_a_share_that_is_no_binary_fraction_drops_at_its_step() -> None:
    steps, last = 90, 63
    assert 0.7 * steps < last  # by rounding
    schedule = _schedule("--lr", "1", "--lr-drop", "0.7", steps=steps)
    assert schedule.rate(last) == 1.0
    assert schedule.rate(last + 1) == pytest.approx(0.1)


def test_caffe_and_torchvision_drop_where_their_programs_do() -> None:
    caffe = _schedule("--recipe", "caffe", steps=450_000)
    for iteration in (0, 99_999, 100_000, 199_999, 200_000, 400_000, 449_999):
        expected = 0.01 * 0.1 ** (iteration // 100_000)
        assert caffe.rate(iteration + 1) == pytest.approx(expected)
    torchvision = _schedule("--recipe", "torchvision", steps=90 * 5005)
    for epoch in range(90):
        assert torchvision.rate(epoch * 5005 + 1) == pytest.approx(0.01 * 0.1 ** (epoch // 30))


def test_a_plateau_waits_as_long_after_a_drop() -> None:
    schedule = _schedule("--schedule", "plateau", "--lr-patience", "3", steps=100)
    drops = [schedule.validated(0.5) for _ in range(10)]
    assert drops == [False, *[False, False, True] * 3]


def test_a_plateau_drops_the_rate_at_most_so_often() -> None:
    arguments = ["--recipe", "paper", "--lr-patience", "2", "--lr-max-drops", "2"]
    schedule = _schedule(*arguments, steps=100)
    errors = [0.9, 0.8, 0.8, 0.85, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7]
    drops = [schedule.validated(error) for error in errors]
    assert [i for i, dropped in enumerate(drops) if dropped] == [3, 6]
    assert schedule.rate(50) == pytest.approx(1e-4)
    again = _schedule(*arguments, steps=100)
    again.restore(schedule.state())
    assert again.state() == schedule.state()
    assert again.rate(50) == schedule.rate(50)


def test_norm_is_exact_over_millions() -> None:
    layer = torch.nn.Linear(4096, 4096, bias=False)
    layer.weight.grad = torch.full_like(layer.weight, 1e-3)
    assert float(gradient_norms(layer)["weight"]) == pytest.approx(1e-3 * 4096, rel=1e-7)
