"""The reference nets against nets written out by hand, and the fused nets against the reference.

The hand-written forward passes follow each source step by step with plain functions: the paper's
and the authors' as two separate towers, Caffe's with groups, torchvision's as one column.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fastalex import AlexNet
from fastalex.model.alexnet import ReferenceAlexNet
from tests._nets import narrow

NAMES = ("paper", "source2012", "caffe", "owt")
# float64, sums of at most 3,456 terms through eight layers: a thousand times the 2e-16 of one.
BOUND = 1e-12

Parameters = dict[str, torch.Tensor]


def _net(name: str, seed: int = 0) -> AlexNet:
    """In float64, evaluating, with activations of order one in every layer."""
    with torch.device("meta"):
        model = AlexNet(num_classes=10, variant=narrow(name))
    model = model.to(torch.float64).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                spread = (2 / parameter[0].numel()) ** 0.5
                drawn = torch.randn(parameter.shape, generator=generator) * spread
            else:
                drawn = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(drawn)
    return model


def _reference(model: AlexNet) -> ReferenceAlexNet:
    """The reference net on the same weights; their gradients are its own."""
    with torch.device("meta"):
        reference = ReferenceAlexNet(num_classes=10, variant=model.variant)
    reference.load_state_dict(model.state_dict(), strict=True, assign=True)
    return reference.eval()


def _images(size: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    # Loud, so that the response norms weigh in.
    return 8 * torch.randn(batch, 3, size, size, dtype=torch.float64, generator=generator)


def _distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm())


def _pool(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, 2, ceil_mode=True)


def _six(x: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool2d(x, 6)


def _norm(x: torch.Tensor, k: float, alpha: float) -> torch.Tensor:
    """x / (k + alpha * sum of x^2 over five adjacent maps)^0.75."""
    maps = F.pad(x.square(), (0, 0, 0, 0, 2, 2))
    squares = sum(maps[:, i : i + x.shape[1]] for i in range(5))
    return x / (k + alpha * squares) ** 0.75


def _half(p: Parameters, layer: str, tower: int) -> tuple[torch.Tensor, torch.Tensor]:
    return p[f"{layer}.weight"].chunk(2)[tower], p[f"{layer}.bias"].chunk(2)[tower]


def _two_towers(p: Parameters, x: torch.Tensor, first: Callable, second: Callable) -> torch.Tensor:
    """Two nets of half the maps, which see each other's before conv3, fc6, fc7 and fc8."""
    x = F.pad(x, (0, -(x.shape[3] - 11) % 4, 0, -(x.shape[2] - 11) % 4))
    sides = [first(F.conv2d(x, *_half(p, "features.0", t), stride=4)) for t in (0, 1)]
    sides = [
        second(F.conv2d(sides[t], *_half(p, "features.3", t), padding=2).relu()) for t in (0, 1)
    ]
    both = torch.cat(sides, 1)
    sides = [F.conv2d(both, *_half(p, "features.6", t), padding=1).relu() for t in (0, 1)]
    sides = [F.conv2d(sides[t], *_half(p, "features.8", t), padding=1).relu() for t in (0, 1)]
    sides = [
        _six(_pool(F.conv2d(sides[t], *_half(p, "features.10", t), padding=1).relu())).flatten(1)
        for t in (0, 1)
    ]
    for layer in ("classifier.1", "classifier.4"):
        both = torch.cat(sides, 1)
        sides = [F.linear(both, *_half(p, layer, t)).relu() for t in (0, 1)]
    return F.linear(torch.cat(sides, 1), p["classifier.6.weight"], p["classifier.6.bias"])


def _paper(p: Parameters, x: torch.Tensor) -> torch.Tensor:
    def block(x: torch.Tensor) -> torch.Tensor:
        return _pool(_norm(x.relu(), 2.0, 1e-4))

    return _two_towers(p, x, block, block)


def _source2012(p: Parameters, x: torch.Tensor) -> torch.Tensor:
    def second(x: torch.Tensor) -> torch.Tensor:
        x = _norm(x, 2.0, 1e-4 / 5)
        means = F.avg_pool2d(x.square(), 5, 1, 2, count_include_pad=True)
        return _pool(x / (1.0 + 1e-3 * means) ** 0.75)

    return _two_towers(p, x, lambda x: _pool(_norm(x, 2.0, 1e-4 / 5)).relu(), second)


def _caffe(p: Parameters, x: torch.Tensor) -> torch.Tensor:
    def conv(x: torch.Tensor, i: int, **options: int) -> torch.Tensor:
        return F.conv2d(x, p[f"features.{i}.weight"], p[f"features.{i}.bias"], **options).relu()

    x = _pool(_norm(conv(x, 0, stride=4), 1.0, 1e-4 / 5))
    x = _pool(_norm(conv(x, 3, padding=2, groups=2), 1.0, 1e-4 / 5))
    x = conv(conv(x, 6, padding=1), 8, padding=1, groups=2)
    return _classify(p, _pool(conv(x, 10, padding=1, groups=2)))


def _owt(p: Parameters, x: torch.Tensor) -> torch.Tensor:
    for i, stride, padding, pool in (
        (0, 4, 2, True), (3, 1, 2, True), (6, 1, 1, False), (8, 1, 1, False), (10, 1, 1, True),
    ):  # fmt: skip
        weight, bias = p[f"features.{i}.weight"], p[f"features.{i}.bias"]
        x = F.conv2d(x, weight, bias, stride, padding).relu()
        x = F.max_pool2d(x, 3, 2) if pool else x
    return _classify(p, x)


def _classify(p: Parameters, x: torch.Tensor) -> torch.Tensor:
    x = _six(x).flatten(1)
    x = F.linear(x, p["classifier.1.weight"], p["classifier.1.bias"]).relu()
    x = F.linear(x, p["classifier.4.weight"], p["classifier.4.bias"]).relu()
    return F.linear(x, p["classifier.6.weight"], p["classifier.6.bias"])


WRITTEN_OUT = {"paper": _paper, "source2012": _source2012, "caffe": _caffe, "owt": _owt}


@pytest.mark.parametrize("name", NAMES)
def test_both_nets_compute_what_is_written_out(name: str) -> None:
    model = _net(name)
    parameters = model.state_dict()
    smallest = model.smallest_image_size()
    reference = _reference(model)
    for size in (smallest, smallest + 1, 79, 96):  # 79 and 96 fill no, or not every, last window
        images = _images(size)
        with torch.no_grad():
            expected = WRITTEN_OUT[name](parameters, images)
            assert _distance(reference(images), expected) < BOUND
            assert _distance(model(images), expected) < BOUND


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_every_gradient_are_the_reference_s(name: str) -> None:
    model = _net(name, seed=1)
    reference = _reference(model)
    labels = torch.tensor([3, 7])
    inputs, losses = [], []
    for net in (model, reference):
        images = _images(76).requires_grad_()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        inputs.append(images.grad)
        losses.append(loss.detach())
    assert _distance(losses[0], losses[1]) < BOUND
    assert _distance(*inputs) < BOUND
    expected = dict(reference.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        gradient = expected[parameter_name].grad
        assert gradient.norm() > 0, parameter_name
        assert _distance(parameter.grad, gradient) < BOUND, parameter_name
