"""A training step of ours, and the steps of torch's that it is compared with.

Every step begins with the same batch of bytes, which ``Augment`` makes images of within the step,
on the device. All have float32 parameters, products in the same dtype (torch's by autocast) and
torch's SGD with momentum, of which the others use the fused form. So what differs is the net.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastalex.data import decode_size
from fastalex.data.augment import Augment
from fastalex.data.normalization import IMAGENET
from fastalex.distributed.exchange import LoopbackExchange
from fastalex.distributed.towers import cut_to_tower
from fastalex.model.alexnet import AlexNet
from fastalex.model.variants import VARIANTS
from fastalex.training import TrainStep
from fastalex.training.cuda_graph import WARM_UP, capture_on_gpu
from fastalex.training.step import Tricks
from fastalex.tuning.layer_pairs import WrongResult
from fastalex_kernels.reference import relative_error

Step = Callable[[], torch.Tensor]  # does a step and returns its mean loss

# Of a loss. From the second step on a sign within rounding, which went the other way, counts.
TOLERANCES = {"float32": 1e-2, "bf16": 5e-2}
_RATE = 1e-4  # the loss falls from step to step, and not by leaps, which magnify a rounding


@dataclass(frozen=True)
class Training:
    """What is trained, on what."""

    device: torch.device
    precision: str  # of the products, float32 or bf16
    batch: int
    variant: str = "paper"
    image_size: int | None = None  # side in pixels; None is the variant's own
    dropout: float = 0.5

    def bytes(self) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """A batch as the loader gives it, the arguments of ``Augment``, and its labels."""
        n, side = self.batch, decode_size(self._side)
        random = torch.Generator().manual_seed(1)
        images = torch.randint(256, (n, side, side, 3), generator=random, dtype=torch.uint8)
        places = torch.randint(side - self._side + 1, (2, n), generator=random, dtype=torch.int32)
        mirrors = torch.arange(n) % 2 == 0
        pixels = tuple(x.to(self.device) for x in (images, *places.unbind(), mirrors))
        return pixels, torch.arange(n, device=self.device) % 1000

    @property
    def _side(self) -> int:
        return self.image_size or VARIANTS[self.variant].image_size

    def augment(self) -> Augment:
        """What makes images of the bytes."""
        return Augment(IMAGENET, self._side, self.device)

    def net(self, fused: bool = True) -> AlexNet:
        """Our net, or that of torch's layers, with the same weights every time."""
        model = AlexNet(dropout=self.dropout, variant=self.variant, fused=fused)
        model.init_parameters("he", torch.Generator().manual_seed(0))
        return model.to(self.device)


def train_step(training: Training, towers: int = 1, **tricks: bool) -> Step:
    """Our step as it trains: see ``TrainStep``.

    Args:
        training: what is trained.
        towers: 2 makes one tower of two, whose exchanges bring its own halves back at once.
        tricks: of ``fastalex.training.step.Tricks``, those left out; a graph is one on a GPU.
    """
    chosen = replace(Tricks(graph=training.device.type == "cuda"), **tricks)
    model, numbers = training.net(), itertools.count(1)
    if towers > 1:
        cut_to_tower(model, LoopbackExchange())
    optimizer, augment = _optimizer(model), training.augment()
    step = TrainStep(
        model, optimizer, training.precision, augment=augment, tricks=chosen, tell=_fail
    )
    pixels, labels = training.bytes()

    def once() -> torch.Tensor:
        model.seed_dropout(0, next(numbers))
        return step(pixels, labels)

    return once


def _fail(message: str) -> None:
    """A part that runs on ATen is part of how a step trains; without a graph it is another step."""
    if "CUDA graph" in message:
        raise RuntimeError(message)
    print(message)


def autograd_step(training: Training) -> Step:
    """Our net by autograd and torch's optimizer, which is what ``--no-fused-update`` trains."""
    model, numbers = training.net(), itertools.count(1)
    return _autograd(training, model, model, lambda: model.seed_dropout(0, next(numbers)))


def stock_step(training: Training, compiled: bool = False, graph: bool = False) -> Step:
    """The net of stock layers by autograd and torch's optimizer.

    Args:
        training: what is trained.
        compiled: by torch.compile.
        graph: as one CUDA graph, from images to updates.
    """
    model = training.net(fused=False)
    step = _autograd(training, model, torch.compile(model) if compiled else model)
    return _captured(step) if graph else step


def _optimizer(model: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(), lr=_RATE, momentum=0.9, weight_decay=5e-4, fused=fused
    )


def _autograd(
    training: Training, model: AlexNet, net: Any, seed: Callable[[], object] = lambda: None
) -> Step:
    """A step of ``net``, whose parameters are those of ``model``."""
    optimizer, augment = _optimizer(model), training.augment()
    pixels, labels = training.bytes()
    narrow = training.precision == "bf16"

    def once() -> torch.Tensor:
        seed()
        with torch.autocast(training.device.type, dtype=torch.bfloat16, enabled=narrow):
            loss = F.cross_entropy(net(augment(*pixels)), labels)
        return _update(optimizer, loss)

    return once


def _update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()


def _captured(step: Step) -> Step:
    """A step on a GPU as one CUDA graph."""
    here = torch.cuda.current_stream()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(here)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    here.wait_stream(side)
    losses: list[torch.Tensor] = []
    replay = capture_on_gpu(lambda: losses.append(step()))

    def once() -> torch.Tensor:
        replay()
        return losses[0]

    return once


def check_steps(training: Training, make: Callable[[Training], Step], steps: int = 2) -> float:
    """Compare the losses of the first steps, without dropout, with stock layers in float64.

    Args:
        training: what is trained.
        make: makes the step that is compared.
        steps: as many; from the second on they depend on the updates.

    Returns:
        The largest relative error.

    Raises:
        WrongResult: past ``TOLERANCES``.
    """
    plain = replace(training, dropout=0.0)
    step, model = make(plain), plain.net(fused=False).double()
    optimizer = _optimizer(model, fused=False)
    pixels, labels = plain.bytes()
    images = plain.augment()(*pixels).double()
    worst, allowed = 0.0, TOLERANCES[training.precision]
    for number in range(1, steps + 1):
        loss = _update(optimizer, F.cross_entropy(model(images), labels))
        error = relative_error(step(), loss)
        if not error <= allowed:  # NaN is wrong too
            raise WrongResult(
                f"step {number}: loss is {error:.1e} away from float64, allowed are {allowed:.1e}"
            )
        worst = max(worst, error)
    return worst
