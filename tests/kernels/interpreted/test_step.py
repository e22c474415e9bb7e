"""A whole training step under strict rules: exact bounds, no races, memory that begins as NaN."""

from __future__ import annotations

import pytest
import torch

import fastalex_kernels as kernels
from fastalex.data.augment import Augment
from fastalex.training import TrainStep
from fastalex.training.optim import build_optimizer
from tests.training.test_step import NORMAL, SIDE, bare, make_net, pixels, result_of

from .conftest import RealTiles


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
def test_steps_on_real_tiles(target: str, real_tiles: RealTiles) -> None:
    augment = Augment(NORMAL, SIDE, torch.device("cpu"), colored=True)
    trained = []
    for backend in ("triton", "aten"):
        model = make_net(bare("paper"))
        with kernels.backend(backend), real_tiles(target):
            optimizer = build_optimizer(model, 0.001)
            step = TrainStep(model, optimizer, augment=augment)
            losses = []
            for number in range(2):  # recorded, and run again from the list
                model.seed_dropout(3, number)
                losses.append(step(*pixels(number)))
        trained.append(result_of(model, optimizer, losses))
    ours, theirs = trained
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-6)
    for name, weight in ours.weights.items():
        assert float((weight - theirs.weights[name]).norm() / weight.norm()) < 1e-5, name
