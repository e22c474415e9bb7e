"""How the two towers of a net exchange tensors.

A transfer is started and waited for apart, so that what needs neither of its tensors runs
meanwhile: on a GPU the copy has a stream of its own. What runs meanwhile is decided where the step
is written, in fastalex.training; the autograd Function here waits at once.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from fastalex.common.nvtx_ranges import nvtx_range
from fastalex.common.timing import Stopwatch

TOWERS = 2
_TIMED = 5  # of so many steps one is timed on a GPU: a step has 32 events, which cost the host
_CHECK_NUMEL = 1 << 20  # elements sent by the start-up check
# Under its name since torch 2.13, which warns of the older one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Transfer(Protocol):
    """A tensor that is sent to the other tower, and the one that comes back.

    It can be started and waited for again and again: all tensors keep their memory.

    Attributes:
        both: the two towers' tensors [2, *shape], tower 0's first; valid after ``wait``.
        received: the other tower's of them.
    """

    both: torch.Tensor
    received: torch.Tensor

    def start(self) -> None: ...

    def wait(self) -> None: ...


class Exchange(Protocol):
    """What a tower needs of the other one."""

    rank: int

    def transfer(self, sent: torch.Tensor) -> Transfer: ...


class _GatherTransfer:
    """A transfer as an all-gather of two, which a CUDA graph can hold, unlike send and receive."""

    def __init__(self, sent: torch.Tensor, exchange: TowerExchange) -> None:
        self._sent, self._exchange = sent, exchange
        self.both = sent.new_empty((TOWERS, *sent.shape))
        self.received = self.both[1 - exchange.rank]
        self._work: Any = None
        self._started = 0

    def start(self) -> None:
        """Begin to send; the sent tensor must not change until ``wait``."""
        self._started += 1
        self._times = counted_times(self._started, self._sent.device)
        with self._exchange.stopwatch.running(self._sent.device, self._times):
            if self._sent.numel() > 0:
                self._work = _all_gather(
                    self.both.view(-1), self._sent.view(-1), self._exchange.group, async_op=True
                )

    def wait(self) -> None:
        """Until what the other tower sent is there; on a GPU its stream waits, not the host."""
        with self._exchange.stopwatch.running(self._sent.device, self._times):
            if self._work is not None:
                self._work.wait()
                self._work = None


def counted_times(step: int, device: torch.device) -> int:
    """How often the time of a transfer counts in the ``step``-th step: on a GPU one stands for all.

    It is one in the middle, as towers wait for each other after a step that was reported.
    """
    if device.type != "cuda":
        return 1
    return _TIMED if step % _TIMED == _TIMED // 2 else 0


class LoopbackExchange:
    """Stands for the exchange where there is no other tower: what is sent comes back.

    For a look at one tower's step alone: reports, benchmarks and tuning.
    """

    rank = 0

    def transfer(self, sent: torch.Tensor) -> Transfer:
        return LoopbackTransfer(sent)


class LoopbackTransfer:
    """A transfer that goes nowhere."""

    def __init__(self, sent: torch.Tensor) -> None:
        self.sent, self.both = sent, sent.new_empty((TOWERS, *sent.shape))
        self.received = self.both[1]

    def start(self) -> None:
        pass

    def wait(self) -> None:
        self.both.copy_(self.sent)


class TowerExchange:
    """Exchanges tensors with the process that holds the other tower.

    Args:
        mesh: with an axis ``"tower"`` of size 2.
        stopwatch: counts the time that is spent on starting transfers and on waiting for them.
    """

    def __init__(self, mesh: DeviceMesh, stopwatch: Stopwatch | None = None) -> None:
        self.rank: int = mesh.get_local_rank("tower")
        self.group: Any = mesh.get_group("tower")
        self.stopwatch = stopwatch or Stopwatch()

    def transfer(self, sent: torch.Tensor) -> Transfer:
        """A transfer of the contiguous ``sent``; both towers start theirs in the same order."""
        return _GatherTransfer(sent, self)


def checked_exchange(mesh: DeviceMesh, stopwatch: Stopwatch | None = None) -> TowerExchange:
    """An exchange that was seen to work: some machines' GPUs claim peer access and lack it.

    Raises:
        RuntimeError: where a known pattern does not arrive whole on both sides.
    """
    exchange = TowerExchange(mesh, stopwatch)
    pattern = torch.arange(_CHECK_NUMEL, dtype=torch.float32, device=mesh.device_type)
    received = exchanged(exchange, pattern + exchange.rank)
    arrived = torch.equal(received, pattern + (1 - exchange.rank))
    verdict = torch.tensor([float(arrived)], device=mesh.device_type)
    if not (exchanged(exchange, verdict).item() and arrived):
        raise RuntimeError(
            "the towers cannot exchange data: a test pattern arrived damaged; set "
            "NCCL_P2P_DISABLE=1 to go through host memory, or use one GPU"
        )
    return exchange


def exchanged(exchange: Exchange, sent: torch.Tensor) -> torch.Tensor:
    """Send the contiguous ``sent`` to the other tower; what it sent."""
    return _transferred(exchange, sent).received


def _transferred(exchange: Exchange, sent: torch.Tensor) -> Transfer:
    transfer = exchange.transfer(sent)
    transfer.start()
    transfer.wait()
    return transfer


def gather_rows(x: torch.Tensor, rank: int, group: Any) -> None:
    """Fill the contiguous ``x``, of which each tower has written its half, with the other's."""
    if x.numel() > 0:
        mine = x.chunk(TOWERS)[rank]
        _all_gather(x.view(-1), mine.view(-1), group, async_op=True).wait()


class GatherTowers(torch.autograd.Function):
    """Both towers' channels, tower 0's first, of this tower's half [N, C, ...]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        mine, order = dense(x)
        with nvtx_range("exchange forward"):
            theirs = exchanged(exchange, mine)
        halves = [mine, theirs] if exchange.rank == 0 else [theirs, mine]
        whole = torch.cat(halves, dim=order.index(1))
        return whole.permute([order.index(d) for d in range(x.dim())])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        halves = grad.chunk(TOWERS, dim=1)
        theirs, order = dense(halves[1 - ctx.exchange.rank])
        with nvtx_range("exchange backward"):
            received = exchanged(ctx.exchange, theirs)
        received = received.permute([order.index(d) for d in range(grad.dim())])
        return halves[ctx.exchange.rank] + received, None


class AddTowers(torch.autograd.Function):
    """The sum of both towers' outputs [N, C] of half of a layer's inputs each.

    Each comes with the layer's ``bias``, which the sum has once. Both towers get the same bits.
    """

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, bias: torch.Tensor | None, exchange: Exchange
    ) -> torch.Tensor:
        with nvtx_range("exchange forward"):
            both = _transferred(exchange, output.contiguous()).both
        return add_outputs(both, bias, torch.empty_like(output))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad, None, None  # of the bias, too, through the output


def add_outputs(both: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """Both towers' outputs [TOWERS, N, C], of which each has the bias, added into ``out``."""
    total = both.sum(0, dtype=torch.promote_types(both.dtype, torch.float32))
    return out.copy_(total if bias is None else total - bias)


def dense(x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """``x`` with its axes in memory order, contiguous, and that order."""
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda d: (-strides[d], d))
    return x.permute(order).contiguous(), order
