"""A net whose gradients are applied in backward, beside one with an optimizer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from fastalex import AlexNet
from fastalex.config import Settings
from fastalex.fused_update import fuse_updates, gradient_norms, lay_out
from fastalex.optim import build_optimizer, set_learning_rate, velocities
from fastalex.options import parse_arguments

RATES = [1e-3, 1e-3, 1e-4]  # a drop in the middle


def _net(variant: str = "paper") -> AlexNet:
    model = AlexNet(5, variant=variant)
    model.init_parameters("he", torch.Generator().manual_seed(0))
    return model


def _step(model: AlexNet, optimizer: torch.optim.Optimizer, step: int, lr: float) -> float:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(4, 3, 64, 64, generator=generator)
    set_learning_rate(optimizer, lr)
    model.seed_dropout(0, step)
    loss = F.cross_entropy(model(images), torch.arange(4))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().double().norm() / b.detach().double().norm())


@pytest.mark.parametrize("rule", ["paper", "torch"])
def test_it_trains_as_the_optimizer_does(rule: str) -> None:
    apart = _net("caffe")  # its biases have a rate and a decay of their own
    fused = copy.deepcopy(apart)
    lay_out(fused)
    optimizers = [build_optimizer(m, RATES[0], 0.9, 0.01, rule) for m in (apart, fused)]
    owned = fuse_updates(fused, optimizers[1])
    assert set(owned) == dict(apart.named_parameters()).keys()
    for step, lr in enumerate(RATES):
        losses = [_step(m, o, step, lr) for m, o in zip((apart, fused), optimizers, strict=True)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        norms = gradient_norms(apart)
        assert gradient_norms(fused).keys() == norms.keys()
        for name, norm in gradient_norms(fused).items():
            assert float(norm) == pytest.approx(float(norms[name]), rel=1e-4, abs=1e-7), name
    speeds = velocities(apart, optimizers[0])
    for name, velocity in velocities(fused, optimizers[1]).items():
        assert _error(velocity, speeds[name]) < 1e-5, name
    weights = dict(apart.named_parameters())
    for name, weight in fused.named_parameters():
        assert weight.grad is None
        assert _error(weight, weights[name]) < 1e-6, name


def test_a_layer_that_cannot_is_left_to_the_optimizer() -> None:
    model = _net("paper-without-tower-traffic")
    optimizer = build_optimizer(model, 1e-3)
    owned = set(fuse_updates(model, optimizer))
    left = dict(model.named_parameters()).keys() - owned
    assert left
    assert left == {n for n in left if n.startswith("classifier")}, "grouped layers alone"
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _step(model, optimizer, 0, 1e-3)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in owned), name
        assert not torch.equal(parameter, before[name]), name


def test_a_net_that_is_evaluated_keeps_its_weights() -> None:
    model = _net().eval()
    optimizer = build_optimizer(model, 1e-3)
    fuse_updates(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, 64, 64, requires_grad=True)
    model(images).sum().backward()
    assert images.grad is not None
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is not None for p in model.parameters()), "gradients as of any net"


def test_weights_that_are_loaded_are_the_ones_that_train() -> None:
    model, other = _net(), _net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    optimizers = [build_optimizer(m, 0.05) for m in (model, other)]
    for m, optimizer in zip((model, other), optimizers, strict=True):
        fuse_updates(m, optimizer, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        _step(model, optimizers[0], 0, 0.0)
        model.load_state_dict(other.state_dict())
        losses = [_step(m, o, 1, 0.01) for m, o in zip((model, other), optimizers, strict=True)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [
        ([], "cpu", (False, False)),
        ([], "cuda", (True, True)),
        (["--precision", "fp16"], "cuda", (False, True)),
        (["--no-fused-update", "--no-cuda-graph"], "cuda", (False, False)),
        (["--fused-update"], "cpu", (True, False)),
    ],
)
def test_how_a_step_is_executed(
    options: list[str], device: str, expected: tuple[bool, bool]
) -> None:
    settings = Settings.choose(parse_arguments(options), device)
    assert (settings.fused_update, settings.cuda_graph) == expected


def test_two_towers_are_captured_only_if_asked() -> None:
    chosen = [Settings.choose(parse_arguments(o), "cuda", 2) for o in ([], ["--cuda-graph"])]
    assert [settings.cuda_graph for settings in chosen] == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fused-update", "--precision", "fp16"], r"^--fused-update can't .* float16 needs"),
        (["--cuda-graph"], r"^--cuda-graph needs a GPU"),
    ],
)
def test_what_cannot_be_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.choose(parse_arguments(options), "cpu")


def test_a_norm_is_exact_over_millions() -> None:
    model = _net()
    parameter = model.classifier[1].weight
    parameter.grad = torch.full_like(parameter, 1e-3)
    expected = 1e-3 * math.sqrt(parameter.numel())
    assert float(gradient_norms(model)["classifier.1.weight"]) == pytest.approx(expected, rel=1e-7)
