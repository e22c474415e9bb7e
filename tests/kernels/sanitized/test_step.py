"""Whole training steps in bfloat16: no race, nothing out of bounds, right results."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastalex
import fastalex_kernels as kernels
from fastalex.data import Normalization
from fastalex.data.augment import Augment
from fastalex.training import TrainStep
from fastalex.training.optim import build_optimizer
from fastalex.training.step import Tricks
from tests._nets import narrow

# Rounding moves a maximum or a sign here and there, a wrong kernel all of its gradient.
GRADIENT_BOUND = 0.25
LOSS_BOUND = 4 * 8e-3  # 16 roundings to bfloat16 that add up as a random walk
NORMAL = Normalization((127.0,) * 3, (74.0,) * 3)
Changes = dict[str, torch.Tensor]


def _model() -> fastalex.AlexNet:
    variant = narrow("paper")
    # Two norms of one size: their kernel takes long to compile, and is compiled once.
    convolutions = [replace(c, channels=32) if c.norm else c for c in variant.convolutions]
    model = fastalex.AlexNet(10, variant=replace(variant, convolutions=tuple(convolutions)))
    model.init_parameters("he", torch.Generator().manual_seed(0))
    return model


def _batch(device: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Bytes with their crops and colours, and labels."""
    generator = torch.Generator().manual_seed(1)
    images, places, mirrors = (
        torch.randint(high, shape, generator=generator)
        for high, shape in ((256, (4, 76, 76, 3)), (10, (2, 4)), (2, (4,)))
    )
    colors = 20 * torch.randn(4, 3, generator=generator)
    given = [images.byte(), *places.int(), mirrors.bool(), colors]
    return [x.to(device) for x in given], torch.arange(4).to(device)


def _steps(device: str, precision: str, tricks: Tricks, count: int) -> tuple[float, Changes]:
    """The last loss, and what the steps added to each parameter."""
    model = _model().to(device)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    augment = Augment(NORMAL, 67, torch.device(device), colored=True)
    # ttsem runs one launch after the other, and does not know a kernel that waits for another.
    tricks = replace(tricks, dependent_launch=False)
    # float32 by torch's operators: ttsem runs our kernels on any device.
    with kernels.backend("triton" if device == "cuda" else "aten"):
        step = TrainStep(
            model, build_optimizer(model, lr=0.001), precision, augment=augment, tricks=tricks
        )
        for number in range(count):
            model.seed_dropout(3, number)
            loss = step(*_batch(device))
    return loss.item(), {n: (p.detach() - before[n]).cpu() for n, p in model.named_parameters()}


@pytest.mark.parametrize("tricks", [Tricks(), Tricks(fused_update=False, fused_activation=False)])
def test_steps_in_bfloat16(tricks: Tricks) -> None:
    """The first step records, the second goes through the list."""
    loss, changes = _steps("cuda", "bf16", tricks, 2)
    expected, wanted = _steps("cpu", "float32", tricks, 2)
    assert loss == pytest.approx(expected, rel=LOSS_BOUND)
    for name, change in changes.items():
        error = float((change - wanted[name]).norm() / wanted[name].norm())
        assert error <= GRADIENT_BOUND, (name, error)
