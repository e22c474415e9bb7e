"""What runs while two towers swap, and that nothing depends on it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

from fastalex.exchange import gather_towers
from fastalex.layers import Linear, LinearReLUDropout
from fastalex_kernels import conv2d_relu
from fastalex_kernels.momentum import MomentumUpdate, Updates
from fastalex_kernels.reference import TOLERANCES, relative_error

from ._strict import Strict
from .conftest import RealTiles

HALF = torch.float16
ROWS, WIDTH, OUTPUTS = 20, 1040, 40  # a half is 17 steps of 64, and so two parts
PRODUCT, UPDATE = "_linear_relu_dropout_fwd_kernel", "_linear_bwd_weight_update_kernel"
FINISH = "_finish_partials_kernel"


@dataclass
class _Peer:
    """The other tower: its half of the units, its gradient for this half, and what happened."""

    rank: int
    happened: list[str]
    replies: list[torch.Tensor] = field(default_factory=list)
    sent: list[torch.Tensor] = field(default_factory=list)

    def start(self, x: torch.Tensor) -> _Reply:
        assert x.is_contiguous()
        self.happened.append("start")
        self.sent.append(x.clone())
        return _Reply(self)


@dataclass
class _Reply:
    peer: _Peer

    def wait(self) -> torch.Tensor:
        self.peer.happened.append("wait")
        return self.peer.replies.pop(0)


class _Case:
    """A layer that reads both towers' units, and what stands on either side of it."""

    def __init__(self, rank: int, happened: list[str], hidden: bool = True) -> None:
        draw = torch.Generator().manual_seed(rank)
        halves = [torch.randn(ROWS, WIDTH, generator=draw).to(HALF) for _ in range(2)]
        self.mine = halves[rank].clone().requires_grad_()
        self.whole = torch.cat(halves, 1).double().requires_grad_()
        self.layer = (
            LinearReLUDropout(2 * WIDTH, OUTPUTS, 0.0) if hidden else Linear(2 * WIDTH, OUTPUTS)
        )
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) / 16)
        self.grad = torch.randn(ROWS, OUTPUTS, generator=draw).to(HALF)
        self.reply = torch.randn(ROWS, WIDTH, generator=draw).to(HALF)
        self.peer = _Peer(rank, happened, [halves[1 - rank]])
        self.rank = rank

    def update(self) -> Updates:
        rate = torch.tensor([1.0, 0.0, 0.0])  # the velocity is the gradient
        pair = [
            MomentumUpdate(p, torch.zeros_like(p.detach()), rate, "torch", p.detach().to(HALF))
            for p in (self.layer.weight, self.layer.bias)
        ]
        return Updates(*pair)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """In float64: output, the gradient for both halves, and the weight's."""
        weight = self.layer.weight.detach().to(HALF).double().requires_grad_()
        bias = self.layer.bias.detach().to(HALF).double()
        y = F.linear(self.whole, weight, bias)
        y = y.relu() if isinstance(self.layer, LinearReLUDropout) else y
        dx, dw = torch.autograd.grad(y, (self.whole, weight), self.grad.double())
        return y.detach(), dx, dw

    def halves(self, dx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This tower's half of a gradient and the other's."""
        parts = dx.chunk(2, 1)
        return parts[self.rank], parts[1 - self.rank]


def _is_close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    error = relative_error(found.detach(), wanted.detach())
    return bool(error <= TOLERANCES[HALF]) and float(wanted.detach().norm()) > 1


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("hidden", [True, False])
def test_products_run_while_the_halves_are_swapped(
    hidden: bool, rank: int, real_tiles: RealTiles, strict: Strict
) -> None:
    case = _Case(rank, strict.launches, hidden)
    output, dx, dw = case.expected()
    case.layer.update = case.update()
    with real_tiles("sm_90"):
        whole = gather_towers(case.mine, case.peer, summed=hidden, layer=case.layer)
        y = case.layer(whole)
        forward = list(strict.launches)
        case.peer.replies.append(case.reply)
        strict.launches.clear()
        y.backward(case.grad)
    assert forward == ["start", PRODUCT, "wait", PRODUCT, FINISH]
    assert _is_close(y, output)
    assert _is_close(case.layer.update.weight.velocity, dw)
    mine, theirs = case.halves(dx)
    assert case.mine.grad is not None
    if hidden:
        begun = strict.launches.index("start")
        assert strict.launches[begun:] == ["start", UPDATE, "wait"]
        assert _is_close(case.peer.sent[1], theirs)
        assert _is_close(case.mine.grad, mine + case.reply)
    else:  # each process has the whole gradient of the last layer
        assert "start" not in strict.launches
        assert _is_close(case.mine.grad, mine)


def test_parts_are_added_up_alike_in_both_towers(real_tiles: RealTiles) -> None:
    cases = [_Case(rank, [], hidden=False) for rank in range(2)]
    cases[1].layer.load_state_dict(cases[0].layer.state_dict())
    for case, other, sign in zip(cases, cases[::-1], (1, -1), strict=True):
        with torch.no_grad():
            case.mine[:, :400] = sign * 32768.0  # what is added to their sums is rounded to ones
            for each in cases:
                each.layer.weight[:, case.rank * WIDTH :][:, :400] = 1.0
        other.peer.replies = [case.mine.detach()]
    outputs = []
    for case in cases:
        case.layer.update = case.update()
        with real_tiles("sm_90"):
            outputs.append(case.layer(gather_towers(case.mine, case.peer, False, case.layer)))
    assert float(outputs[0].detach().abs().max()) > 1
    assert torch.equal(*outputs)  # to the last bit: the last layer's copies must not part


def test_a_layer_that_an_optimizer_updates_waits_for_the_whole(
    real_tiles: RealTiles, strict: Strict
) -> None:
    case = _Case(0, strict.launches)
    case.layer.to(HALF)
    output, *_ = case.expected()
    with real_tiles("sm_90"):
        y = case.layer(gather_towers(case.mine, case.peer, True, case.layer))
    assert strict.launches[:2] == ["start", "wait"]
    assert _is_close(y, output)


def test_what_was_begun_with_another_weight_or_input_is_not_used(
    real_tiles: RealTiles, strict: Strict
) -> None:
    case, other = _Case(0, strict.launches), _Case(1, [])
    other.layer.update = other.update()
    case.layer.update = case.update()
    output, *_ = case.expected()
    with real_tiles("sm_90"):
        whole = gather_towers(case.mine, case.peer, True, other.layer)
        assert _is_close(case.layer(whole), output)
        case.peer.replies.append(case.whole.detach().to(HALF)[:, WIDTH:])
        whole = gather_towers(case.mine.detach(), case.peer, True, case.layer)
        whole.mul_(2)
        twice = F.linear(2 * case.whole, case.layer.weight.to(HALF).double(), None)
        twice = (twice + case.layer.bias.to(HALF).double()).relu()
        assert _is_close(case.layer(whole), twice)


def test_what_was_begun_before_the_weight_changed_is_not_used(
    real_tiles: RealTiles, strict: Strict
) -> None:
    case = _Case(0, strict.launches)
    case.layer.update = case.update()
    with real_tiles("sm_90"):
        whole = gather_towers(case.mine, case.peer, True, case.layer)
        with torch.no_grad():
            case.layer.weight.neg_()
        assert _is_close(case.layer(whole), case.expected()[0])


def test_a_gradient_that_something_is_added_to_is_sent_anew(
    real_tiles: RealTiles, strict: Strict
) -> None:
    case = _Case(1, strict.launches)
    _, dx, _ = case.expected()
    case.layer.update = case.update()
    with real_tiles("sm_90"):
        whole = gather_towers(case.mine, case.peer, True, case.layer)
        case.peer.replies += [torch.full_like(case.reply, torch.nan), case.reply]
        loss = (case.layer(whole) * case.grad).sum() + 3 * whole.sum()
        loss.backward()
    mine, theirs = case.halves(dx + 3)
    assert _is_close(case.peer.sent[-1], theirs)
    assert case.mine.grad is not None
    assert _is_close(case.mine.grad, mine + case.reply)
    assert case.peer.replies == []  # the first swap was waited for, as the other tower does


def test_a_convolution_sends_a_gradient_before_it_computes_its_weight_s(
    real_tiles: RealTiles, strict: Strict
) -> None:
    draw = torch.Generator().manual_seed(7)
    mine, theirs, reply = (torch.randn(4, 16, 3, 3, generator=draw).to(HALF) for _ in range(3))
    weight = (torch.randn(16, 32, 3, 3, generator=draw) / 16).to(HALF).requires_grad_()
    grad = torch.randn(4, 16, 3, 3, generator=draw).to(HALF)
    mine.requires_grad_()
    peer = _Peer(1, strict.launches, [theirs.permute(2, 3, 0, 1), reply.permute(2, 3, 0, 1)])
    with real_tiles("sm_90"):
        hwnc = mine.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
        y = conv2d_relu(gather_towers(hwnc, peer, True), weight, padding=1, relu=False)
        strict.launches.clear()
        y.backward(grad)
    sent, weights = strict.launches.index("start"), "_conv2d_bwd_weight_kernel"
    assert weights in strict.launches[sent : strict.launches.index("wait")]
    whole = torch.cat([theirs, mine.detach()], 1).double().requires_grad_()
    wide = weight.detach().double().requires_grad_()
    dx, dw = torch.autograd.grad(F.conv2d(whole, wide, padding=1), (whole, wide), grad.double())
    assert mine.grad is not None
    assert weight.grad is not None
    assert _is_close(mine.grad, dx[:, 16:] + reply)
    assert _is_close(peer.sent[1].permute(2, 3, 0, 1), dx[:, :16])
    assert _is_close(weight.grad, dw)


def test_in_inference_mode_towers_swap_as_ever(real_tiles: RealTiles, strict: Strict) -> None:
    """There tensors have no versions by which a change could be told."""
    case = _Case(0, strict.launches)
    output, *_ = case.expected()
    case.layer.update = case.update()
    with real_tiles("sm_90"), torch.inference_mode():
        y = case.layer(gather_towers(case.mine, case.peer, True, case.layer))
    assert _is_close(y, output)
