"""How the two towers of a net swap tensors.

A swap is begun and waited for apart, and what needs neither of its tensors runs meanwhile: on a GPU
the copy has a stream of its own. Forward, a fully connected layer begins with the half of its input
that is there; backward, the other tower's half of a gradient is sent before the weights' gradients
are computed. What is left to wait for is before conv3, whose sums would cost more to store than the
copy takes.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from fastalex.layers import FullyConnectedLayer
from fastalex.meter import Stopwatch
from fastalex.nvtx_ranges import nvtx_range
from fastalex_kernels._begun import carry
from fastalex_kernels._handover import hand_over, masked, offers, wanted

TOWERS = 2
_CHECK_NUMEL = 1 << 20  # elements sent by the start-up check
# Under its name since torch 2.13, which warns of the older one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Transfer(Protocol):
    """A swap on its way."""

    def wait(self) -> torch.Tensor: ...


class Exchange(Protocol):
    """What a tower needs of the other one."""

    rank: int

    def start(self, x: torch.Tensor) -> Transfer: ...


class _Swap:
    """A tensor that was sent and the one that is received for it, held until both are done.

    An all-gather of two: each sends all of its tensor and gets the other's. Unlike a pair of send
    and receive it can be captured in a CUDA graph.
    """

    def __init__(self, x: torch.Tensor, exchange: TowerExchange) -> None:
        self._device, self._exchange = x.device, exchange
        self._sent = x.cpu() if exchange.staged else x
        self._both = self._sent.new_empty((TOWERS, *x.shape))
        self._work: Any = None
        if x.numel():
            self._work = _all_gather(
                self._both.view(-1), self._sent.view(-1), exchange.group, async_op=True
            )

    def wait(self) -> torch.Tensor:
        """What was received; on a GPU its stream waits, and not the host."""
        with self._exchange.stopwatch.running(self._device):
            if self._work is not None:
                self._work.wait()
            return self._both[1 - self._exchange.rank].to(self._device)


class TowerExchange:
    """Swaps tensors of one shape with the process that holds the other tower.

    Args:
        mesh: with an axis ``"tower"`` of size 2.
        staged: whether tensors go through host memory, for machines whose GPUs claim peer access
            and do not have it.

    Attributes:
        stopwatch: counts the time that is spent on starting swaps and on waiting for them.
    """

    def __init__(self, mesh: DeviceMesh, staged: bool = False) -> None:
        self.rank: int = mesh.get_local_rank("tower")
        self.group: Any = _host_group(mesh) if staged else mesh.get_group("tower")
        self.staged = staged
        self.stopwatch = Stopwatch()

    def start(self, x: torch.Tensor) -> _Swap:
        """Begin to send the contiguous ``x``, which must not change until the swap is waited for.

        Both towers start their swaps in the same order.
        """
        with self.stopwatch.running(x.device):
            return _Swap(x, self)

    def swap(self, x: torch.Tensor) -> torch.Tensor:
        """Send the contiguous ``x`` to the other tower, return what it sent."""
        return self.start(x).wait()

    def works(self, device: torch.device) -> bool:
        """Whether a known pattern arrives whole, on both sides."""
        pattern = torch.arange(_CHECK_NUMEL, dtype=torch.float32, device=device)
        received = self.swap(pattern * (2 * self.rank - 1) - self.rank)
        expected = pattern * (1 - 2 * self.rank) - (1 - self.rank)
        verdict = torch.tensor([float(torch.equal(received, expected))], device=device)
        return bool(self.swap(verdict).item()) and bool(verdict.item())


def _host_group(mesh: DeviceMesh) -> Any:
    """The tower group on gloo; every process of the world takes part in making each of them."""
    mine = None
    for ranks in mesh.mesh.reshape(-1, TOWERS).tolist():
        group = dist.new_group(ranks, backend="gloo")
        if dist.get_rank() in ranks:
            mine = group
    return mine


def check_copies(mesh: DeviceMesh) -> TowerExchange:
    """An exchange that was seen to work: direct, else through host memory.

    Raises:
        RuntimeError: where a known pattern arrives by neither way.
    """
    device = torch.device(mesh.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    for staged in (False, True):
        exchange = TowerExchange(mesh, staged)
        if exchange.works(device):
            return exchange
    raise RuntimeError(
        "the towers cannot exchange data: a test pattern arrived damaged, both directly and "
        "through host memory; check the machine's interconnect, or use one GPU"
    )


class GatherTowers(torch.autograd.Function):
    """Both towers' channels, tower 0's first, of this tower's [N, C, ...]: see ``gather_towers``.

    A ReLU's mask is the same in both gradients, so what each applied it to adds up to a masked one:
    that is handed on, see fastalex_kernels._handover.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, transfer: Transfer, exchange: Exchange, summed: bool
    ) -> torch.Tensor:
        ctx.exchange, ctx.summed, ctx.early = exchange, summed, None
        offers(ctx, wanted(x), exchange)
        if summed:
            ctx.gradient_announced = _send_early
        mine, order = dense(x)
        with nvtx_range("exchange forward"):
            theirs = transfer.wait()
        halves = [mine, theirs] if exchange.rank == 0 else [theirs, mine]
        whole = torch.cat(halves, dim=order.index(1))
        return whole.permute([order.index(d) for d in range(x.dim())])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        mine = grad.chunk(TOWERS, dim=1)[ctx.exchange.rank]
        if ctx.summed:
            order = _memory_order(grad)
            with nvtx_range("exchange backward"):
                received = _in_flight(ctx, grad).wait()
            mine = mine + received.permute([order.index(d) for d in range(grad.dim())])
        return hand_over(mine) if masked(grad) else mine, None, None, None


def _send(node: Any, grad: torch.Tensor) -> Transfer:
    """Begin to swap the other tower's half of a gradient for this one's."""
    theirs, _ = dense(grad.chunk(TOWERS, dim=1)[1 - node.exchange.rank])
    with nvtx_range("exchange backward"):
        transfer: Transfer = node.exchange.start(theirs)
    return transfer


def _send_early(node: Any, grad: torch.Tensor) -> None:
    """What the layer behind calls while it has weights' gradients to compute."""
    if node.early is None:
        node.early = (grad, grad._version, _send(node, grad))


def _in_flight(node: Any, grad: torch.Tensor) -> Transfer:
    """The swap of ``grad``, which was begun early unless something was added to it since."""
    early, node.early = node.early, None
    if early is not None:
        sent, version, transfer = early
        if sent is grad and version == grad._version:
            return transfer  # type: ignore[no-any-return]
        transfer.wait()
    return _send(node, grad)


def gather_towers(
    x: torch.Tensor, exchange: Exchange, summed: bool, layer: nn.Module | None = None
) -> torch.Tensor:
    """Both towers' channels, tower 0's first, of this tower's [N, C, ...].

    Args:
        x: this tower's half.
        exchange: with the other tower.
        summed: whether the two processes' gradients add up: they do before a layer that each
            process holds half of, not before one that both hold whole.
        layer: what reads the result, and may begin with ``x`` alone.
    """
    with torch.no_grad():
        mine, _ = dense(x)
        with nvtx_range("exchange forward"):
            transfer = exchange.start(mine)
        begun = None
        if isinstance(layer, FullyConnectedLayer):
            begun = layer.begin(x, exchange.rank)
    whole: torch.Tensor = GatherTowers.apply(  # type: ignore[no-untyped-call]
        x, transfer, exchange, summed
    )
    return carry(whole, begun)


def dense(x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """``x`` with its axes in memory order, contiguous, and that order."""
    order = _memory_order(x)
    return x.permute(order).contiguous(), order


def _memory_order(x: torch.Tensor) -> list[int]:
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda d: (-strides[d], d))
