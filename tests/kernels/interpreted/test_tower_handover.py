"""A ReLU's mask made by the layer behind an exchange between towers."""

from __future__ import annotations

import pytest
import torch

import fastalex_kernels as fk
from fastalex.exchange import gather_towers
from fastalex_kernels.momentum import MomentumUpdate, Updates
from fastalex_kernels.reference import TOLERANCES, relative_error

from ._strict import Strict
from .conftest import RealTiles

HALF = torch.float16
APART = "_epilogue_bwd_kernel"
ROWS, INPUTS, WIDTH, OUTPUTS = 20, 24, 32, 40


class _Peer:
    """The other tower: its half of the units, and its gradient for this half."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        draw = torch.Generator().manual_seed(5)
        self.half = torch.randn(ROWS, WIDTH, generator=draw).relu().to(HALF)
        self.gradient = torch.randn(ROWS, WIDTH, generator=draw).to(HALF)
        self.mine: torch.Tensor | None = None
        self.sent: list[torch.Tensor] = []

    def start(self, x: torch.Tensor) -> _Peer:
        assert x.is_contiguous()
        self.sent.append(x.clone())
        return self

    def wait(self) -> torch.Tensor:
        if self.mine is None:
            self.mine = self.sent[0]
            return self.half.clone()
        return torch.where(self.mine > 0, self.gradient, 0.0)  # masked there as it is here


def _update(weight: torch.Tensor, bias: torch.Tensor) -> Updates:
    rate = torch.tensor([0.25, 0.0, 0.0])  # the velocity is the gradient
    pair = [
        MomentumUpdate(p, torch.zeros_like(p.detach()), rate, "torch", p.detach().to(HALF))
        for p in (weight, bias)
    ]
    return Updates(*pair)


def _gradients(peer: _Peer, summed: bool, updated: bool) -> list[torch.Tensor]:
    """Of input, weight and bias of a layer whose units are exchanged before the next one."""
    draw = torch.Generator().manual_seed(peer.rank)
    x = torch.randn(ROWS, INPUTS, generator=draw).to(HALF).requires_grad_()
    w, b = (torch.randn(*s, generator=draw).requires_grad_() for s in ((WIDTH, INPUTS), (WIDTH,)))
    v = torch.randn(OUTPUTS, 2 * WIDTH, generator=draw).mul_(0.2).to(HALF)
    operands = (w, b) if updated else (w.to(HALF), b.to(HALF))
    update = _update(w, b) if updated else None
    rng = torch.tensor([3, 4])
    y = fk.linear_relu_dropout(x, *operands, p=0.3, rng=rng, update=update)
    whole = gather_towers(y, peer, summed)
    z = fk.linear_relu_dropout(whole, v, p=0.0, relu=False)
    z.backward(torch.randn(z.shape, generator=draw).to(HALF))
    assert x.grad is not None
    if update is None:
        assert w.grad is not None
        assert b.grad is not None
        return [x.grad, w.grad, b.grad]
    assert update.bias is not None
    return [x.grad, update.weight.velocity, update.bias.velocity]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("summed", [False, True])
def test_the_layer_behind_the_exchange_masks(
    summed: bool, rank: int, real_tiles: RealTiles, strict: Strict
) -> None:
    with real_tiles("sm_90"):
        apart = _Peer(rank)
        expected = _gradients(apart, summed, updated=False)
        assert APART in strict.launches
        strict.launches.clear()
        peer = _Peer(rank)
        ours = _gradients(peer, summed, updated=True)
    assert APART not in strict.launches
    for one, other in zip(ours, expected, strict=True):
        assert relative_error(one, other) <= TOLERANCES[HALF]
        assert float(other.norm()) > 1
    assert len(peer.sent) == len(apart.sent) == 1 + summed
    if summed:  # what the peer is sent is masked by its own units
        masked = torch.where(peer.half > 0, apart.sent[1], 0.0)
        assert relative_error(peer.sent[1], masked) <= TOLERANCES[HALF]
