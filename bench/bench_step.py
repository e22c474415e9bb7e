"""A whole training step of AlexNet, ours against the same net from stock torch.nn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastalex_kernels as kernels
from fastalex import AlexNet
from fastalex.cost import Floor
from fastalex.layer_pairs import check_nets, make_nets
from fastalex.reference import ReferenceAlexNet

from ._report import Report
from ._rivals import RIVALS
from ._timing import clock, take_turns

pytestmark = pytest.mark.benchmark(timer=clock)

BATCH = {"cpu": 32, "cuda": 128}
ROUNDS = {"cpu": 7, "cuda": 50}
CLASSES = 1000


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
    return make_nets("paper", device, dtype)


@pytest.fixture(scope="module")
def error(nets: tuple[AlexNet, ReferenceAlexNet]) -> float:
    return check_nets(nets)


@pytest.mark.parametrize("against", RIVALS)
def test_step(
    benchmark: Any,
    report: Report,
    device: str,
    dtype: torch.dtype,
    sizes: Callable[[int, int], tuple[int, int]],
    nets: tuple[AlexNet, ReferenceAlexNet],
    error: float,
    against: str,
) -> None:
    ours, stock = nets
    batch, rounds = sizes(BATCH[device], ROUNDS[device])
    images = torch.randn(batch, 3, 224, 224).to(device, dtype)
    rivals = {
        "stock": lambda: Trainee(stock, images),
        "aten": lambda: Trainee(copy.deepcopy(ours), images, "aten"),
        "compiled": lambda: Trainee(torch.compile(stock), images),
    }
    us, them = Trainee(ours, images), rivals[against]()
    times = take_turns(benchmark, us.step, them.step, rounds)
    report.add(
        benchmark,
        "step",
        times,
        work_of_step(us),
        layer="step",
        direction="training",
        against=against,
        batch=batch,
        dtype=str(dtype).removeprefix("torch."),
        error=error,
    )


def work_of_step(trainee: Trainee) -> Floor:
    """The products that torch counts in a step, and the optimizer's reads and writes."""
    with FlopCounterMode(display=False) as counter, kernels.backend("aten"):
        trainee.step()
    parameters = list(trainee.net.parameters())
    size = parameters[0].element_size()
    return Floor(counter.get_total_flops(), 5 * size * sum(p.numel() for p in parameters))
