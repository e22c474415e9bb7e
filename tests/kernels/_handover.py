"""A layer that applies its gradients, and the layer behind it that masks them, and sums them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import fastalex_kernels as fk
from fastalex_kernels.conv2d_relu import pack_weight
from fastalex_kernels.momentum import MomentumUpdate, Updates
from fastalex_kernels.reference import relative_error, tolerance

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Pair:
    """Two layers.

    Args:
        behind: the second, a key of ``BEHIND``.
        images: in the batch.
        channels: of the first layer's output.
        outputs: of the second, where it has a weight.
        size: of the map between two convolutions, or a convolution and pooling.
        p: of the dropout of a fully connected layer.
    """

    behind: str
    images: int
    channels: int = 32
    outputs: int = 48
    size: tuple[int, int] = (9, 7)
    p: float = 0.0

    def __str__(self) -> str:
        return f"{self.behind}-{self.images}-{self.channels}-{self.outputs}"

    @property
    def linear(self) -> bool:
        return self.behind == "linear"


def _convolution(module: Any, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return module.conv2d_relu(y, weight, padding=1, groups=2)  # type: ignore[no-any-return]


def _linear(module: Any, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return module.linear_relu_dropout(y, weight, p=0.0, relu=False)  # type: ignore[no-any-return]


BEHIND: dict[str, Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "chunks": lambda module, y, _: module.lrn_max_pool2d(y, alpha=1.0, groups=2),
    "any LRN": lambda module, y, _: module.lrn_max_pool2d(y, alpha=1.0, size=3, groups=2),
    "pooling": lambda module, y, _: module.max_pool2d(y),
    "convolution": _convolution,
    "linear": _linear,
}
CONVOLUTIONS = [
    Pair("chunks", 3),
    Pair("chunks", 37, size=(3, 5)),  # programs of 32 images, and one of 5
    Pair("chunks", 11, 96, size=(3, 3)),  # of 10 images and a half, and one of the other half
    Pair("any LRN", 3, size=(5, 4)),
    Pair("pooling", 5, size=(5, 4)),
    Pair("pooling", 128, size=(3, 3)),
    Pair("convolution", 3),
    Pair("convolution", 128, 32, 16, size=(2, 3)),
]
LINEARS = [
    Pair("linear", 5, 40, 72, p=0.5),
    Pair("linear", 130, 72, 24, p=0.3),
    Pair("linear", 3, 104, 1640, p=0.3),  # split over programs
    Pair("linear", 128, 64, 1536, p=0.5),
    Pair("linear", 17, 23, 19),  # without dropout
]


def same(y: torch.Tensor) -> torch.Tensor:
    return y


def make_updates(weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> Updates:
    rate = torch.tensor([0.25, 0.0, 0.0], device=weight.device)  # the velocity is the gradient
    made = []
    for parameter in (weight, bias):
        pack = partial(pack_weight, stride=1) if parameter.dim() == 4 else torch.detach
        operand = torch.empty_like(
            pack(parameter.detach()), dtype=dtype, memory_format=torch.contiguous_format
        )
        velocity = torch.zeros_like(parameter.detach())
        made.append(MomentumUpdate(parameter, velocity, rate, "torch", operand, pack))
    return Updates(*made)


def gradients(
    pair: Pair,
    dtype: torch.dtype,
    device: str = "cpu",
    change: Change = same,
    updated: bool = True,
    twice: bool = False,
    module: Any = fk,
    frozen: bool = False,
) -> list[torch.Tensor]:
    """Of the first layer's weight, bias and input.

    Args:
        dtype: of the products.
        change: sees what goes from the first layer to the second.
        updated: whether the first layer applies its gradients.
        twice: gives the first layer's output a gradient of its own as well.
        module: kernels, or the reference, which computes in float64 on the same rounded numbers.
        frozen: whether the first layer's weight is, and has no gradient.
    """
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))

    def rounded(*shape: int) -> torch.Tensor:
        values = draw(*shape).mul_(shape[0] ** -0.25).to(dtype).to(device)
        return values if module is fk else values.double()

    window = () if pair.linear else (3, 3)
    x = rounded(pair.images, 16, *(() if pair.linear else pair.size)).requires_grad_()
    w, b = rounded(pair.channels, 16, *window), rounded(pair.channels)
    inputs = pair.channels if pair.linear else pair.channels // 2
    second = rounded(pair.outputs, inputs, *window)
    w, b = (t.float().requires_grad_() if updated else t.requires_grad_() for t in (w, b))
    w.requires_grad_(not frozen)
    updates = make_updates(w, b, dtype) if updated else None
    given = {"update": updates} if updated else {}
    if pair.linear:
        rng = torch.tensor([7, 3 << 33], device=device)
        y = module.linear_relu_dropout(x, w, b, pair.p, rng=rng, **given)
    else:
        y = module.conv2d_relu(x, w, b, padding=1, **given)
    z = BEHIND[pair.behind](module, change(y), second)
    outputs, received = [z], [rounded(*z.shape)]
    if twice:
        outputs.append(y)
        received.append(rounded(*y.shape))
    torch.autograd.backward(outputs, received)
    if updates is not None and updates.bias is not None:
        found = [updates.weight.velocity, updates.bias.velocity, x.grad]
    else:
        found = [w.grad, b.grad, x.grad]
    return [g for g in found if g is not None]


def compare(ours: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Fail unless they agree as gradients of one function in ``dtype`` do."""
    for one, other in zip(ours, expected, strict=True):
        assert relative_error(one, other) <= tolerance(dtype, 10_000)
        assert float(other.norm()) > 0.1
