"""A training step of ours, and the steps of torch's that it is compared with.

Every step begins with the same batch of bytes, which ``Augment`` makes images of within the step,
on the device. All have float32 parameters, products in the same dtype (torch's by autocast) and
torch's SGD with momentum, of which the others use the fused form. So what differs is the net.
"""

from __future__ import annotations

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
from fastalex.model.alexnet import AlexNet, ReferenceAlexNet
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
    """What is trained, on what.

    Args:
        device: where.
        precision: of the products, ``"float32"`` or ``"bf16"``.
        batch: images of a step.
        variant: of the net.
        image_size: side in pixels; None is the variant's own.
        dropout: probability.
    """

    device: torch.device
    precision: str
    batch: int
    variant: str = "paper"
    image_size: int | None = None
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

    def ours(self) -> AlexNet:
        """Our net, with the same weights every time."""
        model = AlexNet(dropout=self.dropout, variant=self.variant)
        model.init_parameters("he", torch.Generator().manual_seed(0))
        return model.to(self.device)

    def stock(self) -> ReferenceAlexNet:
        """The net of stock layers, with the weights of ours."""
        model = ReferenceAlexNet(dropout=self.dropout, variant=self.variant)
        model.load_state_dict(self.ours().state_dict())
        return model.to(self.device)


def train_step(training: Training, towers: int = 1, **tricks: bool) -> Step:
    """Our step as it trains: see ``TrainStep``.

    Args:
        training: what is trained.
        towers: 2 makes one tower of two, whose exchanges bring its own halves back at once.
        tricks: of ``fastalex.training.step.Tricks``, those left out; a graph is one on a GPU.
    """
    gpu = training.device.type == "cuda"
    chosen = replace(Tricks(graph=gpu), **tricks)
    model = training.ours()
    if towers > 1:
        cut_to_tower(model, LoopbackExchange())
    step = TrainStep(
        model, _optimizer(model), training.precision, augment=training.augment(), tricks=chosen,
        tell=_fail,
    )  # fmt: skip
    pixels, labels = training.bytes()
    number = 0

    def once() -> torch.Tensor:
        nonlocal number
        number += 1
        model.seed_dropout(0, number)
        return step(pixels, labels)

    return once


def autograd_step(training: Training) -> Step:
    """Our net by autograd and torch's optimizer, which is what ``--no-fused-update`` trains."""
    model = training.ours()
    number = 0

    def seed() -> None:
        nonlocal number
        number += 1
        model.seed_dropout(0, number)

    return _autograd(training, model, seed)


def stock_step(training: Training, compiled: bool = False, graph: bool = False) -> Step:
    """The net of stock layers by autograd and torch's optimizer.

    Args:
        training: what is trained.
        compiled: by torch.compile.
        graph: as one CUDA graph, from images to updates.
    """
    model: Any = training.stock()
    step = _autograd(training, torch.compile(model) if compiled else model)
    return _captured(step) if graph else step


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(), lr=_RATE, momentum=0.9, weight_decay=5e-4, fused=True
    )


def _autograd(
    training: Training, model: Callable[..., Any], seed: Callable[[], object] = lambda: None
) -> Step:
    assert isinstance(model, nn.Module)
    optimizer, augment = _optimizer(model), training.augment()
    pixels, labels = training.bytes()
    narrow = training.precision == "bf16"

    def once() -> torch.Tensor:
        seed()
        with torch.autocast(training.device.type, dtype=torch.bfloat16, enabled=narrow):
            loss = F.cross_entropy(model(augment(*pixels)), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return once


def _captured(step: Step) -> Step:
    """A step on a GPU as one CUDA graph."""
    here = torch.cuda.current_stream()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(here)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    here.wait_stream(side)
    loss = torch.empty(())

    def run() -> None:
        nonlocal loss
        loss = step()

    replay = capture_on_gpu(run)

    def once() -> torch.Tensor:
        replay()
        return loss

    return once


def _fail(message: str) -> None:
    """A part that runs on ATen is part of how a step trains; without a graph it is another step."""
    if "CUDA graph" in message:
        raise RuntimeError(message)
    print(message)


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
    step, model = make(plain), plain.stock().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=_RATE, momentum=0.9, weight_decay=5e-4)
    pixels, labels = plain.bytes()
    images = plain.augment()(*pixels).double()
    worst, allowed = 0.0, TOLERANCES[training.precision]
    for number in range(1, steps + 1):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        error = relative_error(step(), loss.detach())
        if not error <= allowed:  # NaN is wrong too
            raise WrongResult(
                f"step {number}: loss is {error:.1e} away from float64, allowed are {allowed:.1e}"
            )
        worst = max(worst, error)
    return worst
