"""The layers of a training step: each knows its forward pass and, from it, its backward pass.

What a layer was given and made stays on it between the two. Everything else is an argument or a
result. A backward pass takes the gradient of the layer's output and returns that of its input; with
it go partial sums for the bias gradient of the layer below, where a kernel had them in registers.

The backward pass of a ReLU is part of the kernel that makes the gradient it masks: a layer is told
with ``relu_below`` that a ReLU made its input, and returns the gradient before that ReLU. A layer
whose own gradient did not come so, because torch made it, undoes its ReLU first.

Layouts: maps are HWNC, [H, W, N, C] contiguous; rows are [N, features].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from fastalex.distributed.exchange import TOWERS, Exchange, Transfer
from fastalex.model.layers import Conv2dReLU, Linear, LinearReLUDropout, LRNMaxPool2d, MaxPool2d
from fastalex.training.updates import Update
from fastalex_kernels.common.epilogue import epilogue_backward
from fastalex_kernels.common.launch import call
from fastalex_kernels.common.layout import as_hwnc, as_nchw
from fastalex_kernels.common.parameters import Norm, Window
from fastalex_kernels.conv2d.forward import conv2d_relu_backward_input, conv2d_relu_forward
from fastalex_kernels.conv2d.weight import conv2d_relu_backward_weight
from fastalex_kernels.linear.forward import HalvedProduct, matmul
from fastalex_kernels.lrn_pool.general import (
    channel_groups,
    lrn_max_pool2d_backward,
    lrn_max_pool2d_forward,
)

Tensor = torch.Tensor
Gradient = tuple[Tensor | None, Tensor | None]  # of the input; bias partials of the layer below


@dataclass(frozen=True)
class Place:
    """Where a layer stands in the chain.

    Attributes:
        first: nothing wants the gradient of its input.
        relu_below: a ReLU made its input, and its backward pass is this layer's to do.
        relu_done: the layer above does this layer's ReLU's.
    """

    first: bool = False
    relu_below: bool = False
    relu_done: bool = False


class Pass(Protocol):
    """A layer of the step.

    Attributes:
        relu: whether its output comes from a ReLU.
        masks: whether its backward pass can do that of a ReLU below.
    """

    relu: bool
    masks: bool
    place: Place

    def forward(self, x: Tensor) -> Tensor: ...

    def backward(self, dy: Tensor, partials: Tensor | None) -> Gradient: ...


class Gather:
    """Both towers' halves of a layer's input, and this tower's half of its gradient.

    Channels are the last axis, tower 0's first.

    Args:
        exchange: with the other tower.
        summed: whether the two towers' gradients add up: before a layer of which each has half.
    """

    def __init__(self, exchange: Exchange, summed: bool) -> None:
        self.rank, self._exchange, self._summed = exchange.rank, exchange, summed

    def start(self, mine: Tensor) -> None:
        self._mine, self._transfer = mine, self._exchange.transfer(mine)
        call(self._transfer.start)

    def wait(self) -> Tensor:
        """The other tower's half."""
        call(self._transfer.wait)
        return self._transfer.received

    def whole(self) -> Tensor:
        halves = [self._mine, self._transfer.received]
        out = self._mine.new_empty((*self._mine.shape[:-1], TOWERS * self._mine.shape[-1]))
        call(torch.cat, halves if self.rank == 0 else halves[::-1], dim=-1, out=out)
        return out

    def start_gradient(self, dx: Tensor) -> Transfer | None:
        """Send the other tower its half of ``dx``, if it adds to what it has itself."""
        if not self._summed:
            return None
        theirs = dx.chunk(TOWERS, -1)[1 - self.rank]
        sent = theirs.new_empty(theirs.shape)
        call(sent.copy_, theirs)
        transfer = self._exchange.transfer(sent)
        call(transfer.start)
        return transfer

    def wait_gradient(self, dx: Tensor, transfer: Transfer | None) -> Tensor:
        """This tower's half of ``dx``, with what the other one sent."""
        mine = dx.chunk(TOWERS, -1)[self.rank]
        if transfer is None:
            return mine
        call(transfer.wait)
        out = mine.new_empty(mine.shape)
        call(torch.add, mine, transfer.received, out=out)
        return out


class Convolution:
    """Convolution + bias + ReLU at stride 1; the first layer of the net at any stride."""

    masks = True

    def __init__(
        self, module: Conv2dReLU, update: Update, gather: Gather | None, early: bool
    ) -> None:
        self.module, self.update, self.place = module, update, Place()
        self.relu, self._gather, self._early = module.relu, gather, early

    def forward(self, x: Tensor) -> Tensor:
        if self._gather is not None:
            self._gather.start(x)
            self._gather.wait()
            x = self._gather.whole()
        padding = int(self.module.padding[0])
        # Of a stride, blocks of pixels became channels, and the padding zeros among them.
        pad = padding if self.module.stride[0] == 1 else 0
        self._padding = ((pad, pad), (pad, pad))
        self._x, self._w = x, self.update.weight()
        self._y = as_hwnc(
            conv2d_relu_forward(
                x, self._w, self.update.bias(), self._padding, self.module.groups, self.relu
            )
        )
        return self._y

    def backward(self, dy: Tensor, partials: Tensor | None) -> Gradient:
        dz, partials = self._before_relu(dy, partials)
        dx = below = transfer = None
        if not self.place.first:
            mask = self._x if self.place.relu_below else None
            size = (self._x.shape[0], self._x.shape[1])
            made, below = conv2d_relu_backward_input(
                dz, self._w, size, self._padding, self.module.groups, mask
            )
            dx = as_hwnc(made)
        if dx is not None and self._gather is not None:
            below = None  # sums of one tower's share
            transfer = self._gather.start_gradient(dx)
            if not self._early:
                dx, transfer = self._gather.wait_gradient(dx, transfer), None
        R, S = self._w.shape[:2]
        part = conv2d_relu_backward_weight(self._x, dz, (R, S), self._padding, self.module.groups)
        self.update.convolution(part, partials)
        if transfer is not None and dx is not None and self._gather is not None:
            dx = self._gather.wait_gradient(dx, transfer)
        return dx, below

    def _before_relu(self, dy: Tensor, partials: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gradient before the ReLU, and partials of its sum."""
        if partials is not None:
            return dy, partials
        rows = dy.view(-1, dy.shape[-1])
        y = self._y.view(rows.shape) if self.relu and not self.place.relu_done else None
        dz, sums = epilogue_backward(rows, y, need_sums=True)
        assert dz is not None
        assert sums is not None
        return dz.view(dy.shape), sums


class Pool:
    """Max-pooling, after response normalisation where the layer has one, before ReLU if asked."""

    masks = True

    def __init__(self, module: MaxPool2d) -> None:
        self.module, self.place = module, Place()
        self.relu = False
        self._norm, self._groups = None, 0
        self._window = Window(module.kernel_size, module.stride)
        if isinstance(module, LRNMaxPool2d):
            alpha = module.alpha / module.size
            self._norm = Norm(module.size, alpha, module.beta, module.k, module.signed)
            self._groups, self.relu = module.groups, module.relu

    def forward(self, x: Tensor) -> Tensor:
        height, width = (self.module.output_size(side) for side in x.shape[:2])
        self._groups = self._groups or channel_groups(x.shape[3])
        y, self._argmax = lrn_max_pool2d_forward(
            x, self._norm, self._groups, self._window, (height, width), save=True
        )
        self._x, self._y = x, as_hwnc(y)
        if self.relu:
            call(self._y.relu_)
        return self._y

    def backward(self, dy: Tensor, partials: Tensor | None) -> Gradient:
        if self.relu and not self.place.relu_done:
            rows = dy.view(-1, dy.shape[-1])
            dz, _ = epilogue_backward(rows, self._y.view(rows.shape))
            assert dz is not None
            dy = dz.view(dy.shape)
        dx, below = lrn_max_pool2d_backward(
            self._x,
            dy,
            self._argmax,
            self._norm,
            self._groups,
            self._window,
            (self._x.shape[0], self._x.shape[1]),
            mask=self.place.relu_below,
            y=None if self._norm else self._y,
        )
        return as_hwnc(dx), below


class Flatten:
    """Maps as rows of features, in torch's order: channel, row, column."""

    relu = masks = False

    def __init__(self) -> None:
        self.place = Place()

    def forward(self, x: Tensor) -> Tensor:
        self._shape = x.shape
        H, W, N, C = x.shape
        out = x.new_empty((N, C * H * W))
        call(out.view(N, C, H, W).copy_, as_nchw(x))
        return out

    def backward(self, dy: Tensor, partials: Tensor | None) -> Gradient:
        H, W, N, C = self._shape
        out = dy.new_empty(self._shape)
        call(as_nchw(out).copy_, dy.view(N, C, H, W))
        return out, None


class FullyConnected:
    """Fully connected + bias, with ReLU and dropout but in the last layer."""

    masks = True

    def __init__(
        self,
        module: Linear | LinearReLUDropout,
        update: Update,
        gather: Gather | None,
        early: bool,
    ) -> None:
        self.module, self.update, self.place = module, update, Place()
        self._gather, self._early = gather, early
        self.relu = isinstance(module, LinearReLUDropout)
        self._dropout: dict[str, Any] = {}
        if isinstance(module, LinearReLUDropout) and module.p and module.training:
            self._dropout = {"p": float(module.p), **module.mask._asdict()}

    def forward(self, x: Tensor) -> Tensor:
        self._w = w = self.update.weight()
        epilogue = {"bias": self.update.bias(), "relu": self.relu, **self._dropout}
        gather = self._gather
        if gather is None:
            self._x = x
            self._y = matmul(x, w.t(), **epilogue)
            return self._y
        gather.start(x)
        if self._early and HalvedProduct.gains(x, w):
            product = HalvedProduct(x, w)
            product.add(x, gather.rank)  # while the other tower's half is on its way
            product.add(gather.wait(), 1 - gather.rank)
            self._x = gather.whole()
            self._y = product.finish(**epilogue)
        else:
            gather.wait()
            self._x = gather.whole()
            self._y = matmul(self._x, w.t(), **epilogue)
        return self._y

    def backward(self, dy: Tensor, partials: Tensor | None) -> Gradient:
        if self.place.relu_done or not self.relu:
            dz, p = dy, self._dropout.get("p", 0.0)  # its scale is left to the products
        else:
            flat, _ = epilogue_backward(dy, self._y, **self._dropout)
            assert flat is not None
            dz, p = flat, 0.0
        dx = transfer = None
        if not self.place.first:
            dx = matmul(dz, self._w, p=p, mask=self._x if self.place.relu_below else None)
            if self._gather is not None:
                transfer = self._gather.start_gradient(dx)
                if not self._early:
                    dx, transfer = self._gather.wait_gradient(dx, transfer), None
        self.update.linear(dz, self._x, p)
        if dx is not None and self._gather is not None and (self._early or transfer):
            dx = self._gather.wait_gradient(dx, transfer)
        return dx, None


class Torch:
    """A layer without kernels, by torch's operators and autograd: on a CPU, that is every layer.

    Args:
        module: the layer.
        update: of its parameters; None where it has none.
        relu: whether its output comes from a ReLU.
        autocast: the dtype that torch computes products in.
    """

    masks = False

    def __init__(
        self,
        module: nn.Module,
        update: Update | None,
        gather: Gather | None,
        autocast: torch.dtype,
    ) -> None:
        self.module, self.update, self.place = module, update, Place()
        self.relu, self._gather, self._autocast = False, gather, autocast
        self._parameters = list(module.parameters())
        self._y: Tensor | None = None
        self._dx: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._gather is not None:
            self._gather.start(x)
            self._gather.wait()
            x = self._gather.whole()
        self._x = x
        call(self._run)
        assert self._y is not None
        return self._y

    def _run(self) -> None:
        maps = self._x.dim() == 4
        x = (as_nchw(self._x) if maps else self._x).detach()
        self._leaf = x.requires_grad_(not self.place.first)
        kind = "cpu" if x.is_meta else x.device.type  # autocast knows no tensors without data
        narrow = self._autocast != torch.float32
        with (
            torch.enable_grad(),
            torch.autocast(kind, dtype=self._autocast, enabled=narrow),
        ):
            self._made = self.module.forward(self._leaf)  # the gather, a hook, was done
        made = self._made.detach()
        made = made.permute(2, 3, 0, 1) if maps else made
        if self._y is None:
            self._y = made.new_empty(made.shape, dtype=self._x.dtype)
        self._y.copy_(made)

    def backward(self, dy: Tensor, partials: Tensor | None) -> Gradient:
        call(self._differentiate, dy)
        if self._gather is not None and self._dx is not None:
            transfer = self._gather.start_gradient(self._dx)
            return self._gather.wait_gradient(self._dx, transfer), None
        return self._dx, None

    def _differentiate(self, dy: Tensor) -> None:
        wanted = [x for x in (self._leaf, *self._parameters) if x.requires_grad]
        if not wanted:
            return
        dy = as_nchw(dy) if dy.dim() == 4 else dy
        gradients = list(torch.autograd.grad(self._made, wanted, dy.to(self._made.dtype)))
        del self._made
        if self._leaf.requires_grad:
            dx = gradients.pop(0)
            dx = dx.permute(2, 3, 0, 1) if dx.dim() == 4 else dx
            if self._dx is None:
                self._dx = dx.new_empty(dx.shape)
            self._dx.copy_(dx)
        if self.update is not None:
            self.update.torch(gradients)
