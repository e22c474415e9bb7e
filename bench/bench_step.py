"""A whole training step of AlexNet, ours against the same net from stock torch.nn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastalex_kernels as kernels
from fastalex import AlexNet
from fastalex.reference import ReferenceAlexNet

from ._layers import LAYERS, TOLERANCES, relative_error
from ._report import Report
from ._rivals import RIVALS
from ._timing import Work, clock, take_turns

pytestmark = pytest.mark.benchmark(timer=clock)

BATCH = {"cpu": 32, "cuda": 128}
ROUNDS = {"cpu": 7, "cuda": 50}
CLASSES = 1000
# In float32 one ReLU or maximum within rounding goes the other way now and then, and moves every
# gradient below it by some 2e-3; in bfloat16 many do. Each layer alone has its strict bound.
GRADIENT_TOLERANCES = {torch.float32: 1e-2, torch.bfloat16: 0.4}


class Trainee:
    """A net with its optimizer and one batch to train on.

    Both nets of a comparison have the same optimizer, the one that ``fastalex.train`` uses, and
    images that lie as a data loader makes them.
    """

    def __init__(self, net: nn.Module, images: torch.Tensor, backend: str = "auto") -> None:
        self.net, self.images, self.backend = net, images, backend
        self.labels = torch.arange(len(images), device=images.device) % CLASSES
        self.optimizer = torch.optim.SGD(
            net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True
        )

    def step(self) -> None:
        with kernels.backend(self.backend):
            loss = F.cross_entropy(self.net(self.images), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


@pytest.fixture(scope="module")
def nets(device: str, dtype: torch.dtype) -> tuple[AlexNet, ReferenceAlexNet]:
    """Both nets with the same weights, compared with float64: nothing wrong is timed."""
    torch.manual_seed(0)
    ours, stock = AlexNet(CLASSES, variant="paper"), ReferenceAlexNet(CLASSES, variant="paper")
    ours.init_parameters("he")
    stock.load_state_dict(ours.state_dict())
    return ours.to(device, dtype), stock.to(device, dtype)


@pytest.fixture(scope="module")
def error(nets: tuple[AlexNet, ReferenceAlexNet]) -> float:
    ours, stock = nets
    return check(ours, stock)


@pytest.mark.parametrize("against", RIVALS)
def test_step(
    benchmark: Any,
    report: Report,
    device: str,
    dtype: torch.dtype,
    nets: tuple[AlexNet, ReferenceAlexNet],
    error: float,
    against: str,
) -> None:
    ours, stock = nets
    images = torch.randn(BATCH[device], 3, 224, 224).to(device, dtype)
    rivals = {
        "stock": lambda: Trainee(stock, images),
        "aten": lambda: Trainee(copy.deepcopy(ours), images, "aten"),
        "compiled": lambda: Trainee(torch.compile(stock), images),
    }
    us, them = Trainee(ours, images), rivals[against]()
    times = take_turns(benchmark, us.step, them.step, ROUNDS[device])
    report.add(
        benchmark,
        "step",
        times,
        work_of_step(us),
        layer="step",
        direction="training",
        against=against,
        batch=BATCH[device],
        dtype=str(dtype).removeprefix("torch."),
        error=error,
    )


def check(ours: AlexNet, stock: ReferenceAlexNet) -> float:
    """The relative error of our logits against stock torch in float64, without dropout.

    Raises:
        AssertionError: where each layer adds more than its tolerance, or a gradient is wrong.
    """
    weight = next(ours.parameters())
    images = torch.randn(2, 3, 224, 224).to(weight.device, weight.dtype)
    labels = torch.arange(2, device=weight.device)
    wide = copy.deepcopy(stock).double().eval()
    logits, expected = ours.eval()(images), wide(images.double())
    ours.train()
    error = relative_error(logits, expected)
    assert error <= len(LAYERS) * TOLERANCES[weight.dtype], error
    found = torch.autograd.grad(F.cross_entropy(logits, labels), list(ours.parameters()))
    wanted = torch.autograd.grad(F.cross_entropy(expected, labels), list(wide.parameters()))
    for gradient, reference in zip(found, wanted, strict=True):
        difference = relative_error(gradient, reference)
        assert difference <= GRADIENT_TOLERANCES[weight.dtype], (tuple(gradient.shape), difference)
    return error


def work_of_step(trainee: Trainee) -> Work:
    """The products that torch counts in a step, and the optimizer's reads and writes."""
    with FlopCounterMode(display=False) as counter, kernels.backend("aten"):
        trainee.step()
    parameters = list(trainee.net.parameters())
    size = parameters[0].element_size()
    return Work(counter.get_total_flops(), 5 * size * sum(p.numel() for p in parameters))
