"""The layers of a training step: each knows its forward pass and, from it, its backward pass.

What a backward pass needs of the forward pass stays on the layer between the two. Everything else
is an argument or a result. A backward pass takes the gradient of the layer's output and returns
that of its input; with it go partial sums for the bias gradient of the layer below, where a kernel
had them in registers (``bias_partials``).

The backward pass of a ReLU is part of the kernel that makes the gradient it masks: a layer whose
input a ReLU made (``masks_dx``) returns the gradient before that ReLU (``dy_is_preact`` of the
layer below). A layer whose own gradient did not come so, because torch made it, masks it first.

Layouts: maps are HWNC, [H, W, N, C] contiguous; rows are [N, features].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

import fastalex_kernels as kernels
from fastalex.distributed.exchange import TOWERS, Exchange, Transfer, add_outputs
from fastalex.model import layers
from fastalex.model.layers import Conv2dReLU, Linear, LinearReLUDropout, LRNMaxPool2d, MaxPool2d
from fastalex.training.updates import FusedUpdate
from fastalex_kernels.common.epilogue import drop, epilogue_backward
from fastalex_kernels.common.launch import call
from fastalex_kernels.common.layout import as_hwnc, as_nchw
from fastalex_kernels.common.parameters import NO_DROPOUT, Dropout, Norm, Pooling, Window
from fastalex_kernels.conv2d.forward import conv2d_relu_backward_input, conv2d_relu_forward
from fastalex_kernels.conv2d.weight import conv2d_relu_backward_weight, pack_lines
from fastalex_kernels.linear.forward import Epilogue, HalvedProduct, add_up, matmul
from fastalex_kernels.lrn_pool.function import channel_groups
from fastalex_kernels.lrn_pool.general import lrn_max_pool2d_backward, lrn_max_pool2d_forward

# Of the rows of a convolution that reads both towers, so many are made beside the exchange: those
# that would be left over when every processor of an H100 has had a pixel of AlexNet's conv3.
_EARLY_SHARE = 4

Tensor = torch.Tensor


class Sum(NamedTuple):
    """A gradient in two parts, of two towers, which what reads it adds up."""

    mine: Tensor
    theirs: Tensor


Gradient = tuple[Tensor | Sum | None, Tensor | None]  # dx; bias partials of the layer below


def added(dy: Tensor | Sum) -> Tensor:
    """The gradient in one part."""
    if isinstance(dy, Tensor):
        return dy
    out = torch.empty_like(dy.mine)
    call(torch.add, *dy, out=out)
    return out


class Pass:
    """A layer of the step.

    Attributes:
        relu: whether a ReLU makes its output.
        can_mask: whether its backward kernels can do the backward pass of a ReLU below it.
        needs_dx: whether a layer below needs the gradient of its input.
        masks_dx: whether it does the backward pass of the ReLU below it.
        dy_is_preact: whether the layer above did that of its own ReLU.
        dy_is_sum: whether the gradient of its output comes in two parts.
        module: the layer; None where it is none of the model's.
        update: of its parameters; None where it has none.
        gather: of the other tower's half of its input; None where it needs none.
        outputs: of the other tower's sums, where each has half of its input.
    """

    module: Any = None
    update: FusedUpdate | None = None
    gather: Gather | None = None
    outputs: GatherOutputs | None = None
    relu = can_mask = False
    needs_dx = True
    masks_dx = dy_is_preact = dy_is_sum = False

    def forward(self, x: Tensor) -> Tensor:
        """The output, of the input ``x``."""
        raise NotImplementedError

    def backward(self, dy: Tensor | Sum, bias_partials: Tensor | None) -> Gradient:
        """The gradient of the input, after the layer's own parameters got theirs."""
        raise NotImplementedError


class Gather:
    """An all-gather of both towers' channels before a layer; backward, the reduce-scatter.

    Tower 0's channels are first. ``early``, work goes on while a half is on its way.
    """

    def __init__(self, exchange: Exchange, early: bool) -> None:
        self.rank, self.early, self._exchange = exchange.rank, early, exchange

    def start_rows(self, mine: Tensor, first: int) -> list[Transfer]:
        """Start with the ``first`` rows of maps [H, ...], if any; then all of them follow."""
        transfers = [self._exchange.transfer(x) for x in (mine[:first], mine) if len(x)]
        for transfer in transfers:
            call(transfer.start)
        return transfers

    def halves(self, mine: Tensor, meanwhile: Callable[[], None]) -> list[Tensor]:
        """Both halves, after ``meanwhile``, which runs while the other one is on its way."""
        transfer = self._exchange.transfer(mine)
        call(transfer.start)
        if self.early:
            meanwhile()
        call(transfer.wait)
        if not self.early:
            meanwhile()
        both = [mine, transfer.received]
        return both if self.rank == 0 else both[::-1]

    def __call__(self, mine: Tensor) -> Tensor:
        """Both halves along the last axis, at once."""
        halves = self.halves(mine, lambda: None)
        out = mine.new_empty((*mine.shape[:-1], TOWERS * mine.shape[-1]))
        call(torch.cat, halves, dim=-1, out=out)
        return out

    def reduce_scatter(self, gradient: Callable[[int], Tensor]) -> Sum:
        """Both towers' shares of this one's half, of what makes the gradients of both halves."""
        transfer = self._exchange.transfer(gradient(1 - self.rank))
        call(transfer.start)
        if not self.early:
            call(transfer.wait)
        mine = gradient(self.rank)
        if self.early:
            call(transfer.wait)
        return Sum(mine, transfer.received)

    def start_reduce_scatter(self, halves: Sequence[Tensor]) -> Callable[[], Tensor | Sum]:
        """Send the other tower its half of dx; what waits for its part of the gradient of ours."""
        mine, theirs = _dense(halves[self.rank]), _dense(halves[1 - self.rank])
        transfer = self._exchange.transfer(theirs)
        call(transfer.start)

        def wait() -> Sum:
            call(transfer.wait)
            return Sum(mine, transfer.received)

        if self.early:
            return wait
        parts = wait()
        return lambda: parts


class GatherOutputs:
    """An all-gather of both towers' sums after a layer that is cut by its inputs."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def __call__(self, mine: Tensor) -> Tensor:
        """[TOWERS, *shape], tower 0's first: added up in this order, both get the same bits."""
        transfer = self._exchange.transfer(mine)
        call(transfer.start)
        call(transfer.wait)
        return transfer.both


class Convolution(Pass):
    """Convolution + bias + ReLU at stride 1; the first layer of the net at any stride."""

    update: FusedUpdate
    can_mask = True
    _lines: Tensor | None = None  # of x

    def __init__(self, module: Conv2dReLU, update: FusedUpdate, gather: Gather | None) -> None:
        self.module, self.update, self.gather = module, update, gather
        self.relu, self._groups = module.relu, module.groups
        # Of a stride, blocks of pixels became channels, and the padding zeros among them.
        pad = int(module.padding[0]) if module.stride[0] == 1 else 0
        self._padding = ((pad, pad), (pad, pad))

    def forward(self, x: Tensor) -> Tensor:
        self._w = self.update.weight()
        if self.gather is not None:
            return self._forward_of_two(x, self.gather)
        self._x = x
        if self.module.training:  # for the backward pass, while x is in L2
            R, S = self._w.shape[:2]
            self._lines = pack_lines(x, (R, S), self._groups)
        y = conv2d_relu_forward(
            x, self._w, self.update.bias(), self._padding, self._groups, self.relu
        )
        self._y = as_hwnc(y)
        return self._y

    def _forward_of_two(self, mine: Tensor, gather: Gather) -> Tensor:
        """The output, of both towers' halves; its first rows while most of the maps are to come.

        What the first rows read is sent twice: all that the weight gradient reads is one tensor.
        """
        (top, bottom), sides = self._padding
        (R, S), (H, W, N, _) = self._w.shape[:2], mine.shape
        P, Q = H + top + bottom - R + 1, W + sum(sides) - S + 1
        self._y = y = mine.new_empty((P, Q, N, self._w.shape[3]))
        early = round(P / _EARLY_SHARE) if gather.early and H >= R > top else 0
        first = early + R - 1 - top if early else 0  # rows that they read
        pieces = [(y[:early], (top, 0))] if early else []
        pieces.append((y[early:], (top - early, bottom)))
        for transfer, (out, pads) in zip(gather.start_rows(mine, first), pieces, strict=True):
            call(transfer.wait)
            self._x = transfer.both
            conv2d_relu_forward(
                self._x, self._w, self.update.bias(), (pads, sides), 1, self.relu, out
            )
        return y

    def backward(self, dy: Tensor | Sum, bias_partials: Tensor | None) -> Gradient:
        dz, x = added(dy), self._x
        if bias_partials is None:
            y = self._y if self.relu and not self.dy_is_preact else None
            dz, bias_partials = _before_relu(dz, y, need_sums=True)
            assert bias_partials is not None
        dx = below = wait = None
        if self.needs_dx:
            H, W, *_ = x.shape[-4:]
            grad, below = conv2d_relu_backward_input(
                dz, self._w, (H, W), self._padding, self._groups, x if self.masks_dx else None,
                halves=1 if self.gather is None else TOWERS,
            )  # fmt: skip
            if self.gather is None:
                dx = as_hwnc(grad)
            else:  # the sums are those of one share
                wait = self.gather.start_reduce_scatter(grad.unbind())
                below = None
        R, S = self._w.shape[:2]
        partials = conv2d_relu_backward_weight(
            x, dz, (R, S), self._padding, self._groups, self._lines
        )
        self.update.convolution(partials, bias_partials)
        return (dx if wait is None else wait()), below


class Pool(Pass):
    """Max-pooling, after response normalisation where the layer has one, before ReLU if asked."""

    can_mask = True

    def __init__(self, module: MaxPool2d) -> None:
        self.module = module
        window = Window(module.kernel_size, module.stride)
        self._pooling = Pooling(None, 0, window)
        if isinstance(module, LRNMaxPool2d):
            alpha = module.alpha / module.size
            norm = Norm(module.size, alpha, module.beta, module.k, module.signed)
            self._pooling, self.relu = Pooling(norm, module.groups, window), module.relu

    def forward(self, x: Tensor) -> Tensor:
        height, width = (self.module.output_size(side) for side in x.shape[:2])
        if not self._pooling.groups:
            self._pooling = self._pooling._replace(groups=channel_groups(x.shape[3]))
        y, self._argmax = lrn_max_pool2d_forward(x, self._pooling, (height, width), save=True)
        self._x, self._y = x, as_hwnc(y)
        if self.relu:
            call(self._y.relu_)
        return self._y

    def backward(self, dy: Tensor | Sum, bias_partials: Tensor | None) -> Gradient:
        if self.relu and not self.dy_is_preact:
            dy, _ = _before_relu(added(dy), self._y)
        dy, share = dy if isinstance(dy, Sum) else (dy, None)
        dx, below = lrn_max_pool2d_backward(
            self._x, dy, self._argmax, self._pooling, (self._x.shape[0], self._x.shape[1]),
            mask=self.masks_dx, y=None if self._pooling.norm else self._y, share=share,
        )  # fmt: skip
        return as_hwnc(dx), below


class Flatten(Pass):
    """Maps as rows of features, in torch's order: channel, row, column."""

    def forward(self, x: Tensor) -> Tensor:
        self._shape = x.shape
        H, W, N, C = x.shape
        out = x.new_empty((N, C * H * W))
        call(out.view(N, C, H, W).copy_, as_nchw(x))
        return out

    def backward(self, dy: Tensor | Sum, bias_partials: Tensor | None) -> Gradient:
        H, W, N, C = self._shape
        parts = [x.view(N, C, H, W) for x in (dy if isinstance(dy, Sum) else [dy])]
        out = parts[0].new_empty(self._shape)
        if len(parts) == 1:
            call(as_nchw(out).copy_, *parts)
        else:
            call(torch.add, *parts, out=as_nchw(out))
        return out, None


class DropRows(Pass):
    """Dropout of rows."""

    def __init__(self, module: layers.Dropout) -> None:
        self._dropout = NO_DROPOUT
        if module.training:
            self._dropout = Dropout(float(module.p), *module.mask)

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self._dropout)

    def backward(self, dy: Tensor | Sum, bias_partials: Tensor | None) -> Gradient:
        return drop(added(dy), self._dropout), None


class FullyConnected(Pass):
    """Fully connected + bias, with ReLU and dropout but in the last layer."""

    update: FusedUpdate
    can_mask = True

    def __init__(
        self,
        module: Linear | LinearReLUDropout,
        update: FusedUpdate,
        gather: Gather | None,
        outputs: GatherOutputs | None,
    ) -> None:
        self.module, self.update, self.gather, self.outputs = module, update, gather, outputs
        self.relu = isinstance(module, LinearReLUDropout)
        self._dropout = NO_DROPOUT
        if isinstance(module, LinearReLUDropout) and module.p and module.dropping:
            self._dropout = Dropout(float(module.p), *module.mask)

    def forward(self, x: Tensor) -> Tensor:
        w, gather = self.update.weight(), self.gather
        epilogue = Epilogue(self.update.bias(), self.relu, self._dropout)
        self._x = [x]
        if self.outputs is not None:
            sums = self.outputs(matmul(x, w.t(), dtype=torch.float32))
            self._y = add_up(sums, x.new_empty(sums.shape[1:]), epilogue)
            return self._y
        if gather is None:
            self._y = matmul(x, w.t(), epilogue)
            return self._y
        product = HalvedProduct(x, w)
        self._x = gather.halves(x, lambda: product.add(x, gather.rank))
        theirs = 1 - gather.rank
        product.add(self._x[theirs], theirs)
        self._y = product.finish(epilogue)
        return self._y

    def backward(self, dy: Tensor | Sum, bias_partials: Tensor | None) -> Gradient:
        dz, p = added(dy), self._dropout.p  # its scale is left to the products
        if self.relu and not self.dy_is_preact:
            (dz, _), p = _before_relu(dz, self._y, dropout=self._dropout), 0.0

        def gradient(half: int | None) -> Tensor:
            return self.update.linear(dz, self._x[half or 0], p, self.masks_dx, half)

        if self.gather is None:
            return gradient(None), None
        return self.gather.reduce_scatter(gradient), None


class Torch(Pass):
    """A layer without kernels, by torch's operators and autograd: on a CPU, that is every layer.

    ``autocast`` is the dtype of products, ``backend`` that of fastalex_kernels' functions.
    """

    def __init__(
        self,
        module: nn.Module,
        update: FusedUpdate | None,
        gather: Gather | None,
        outputs: GatherOutputs | None,
        autocast: torch.dtype,
        backend: str = "auto",
    ) -> None:
        self.module, self.update, self.gather, self.outputs = module, update, gather, outputs
        self._backend = backend
        self._autocast, self._parameters = autocast, list(module.parameters())
        self._y: Tensor | None = None
        self._dx: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self._x = x if self.gather is None else self.gather(x)
        call(self._forward)
        assert self._y is not None
        if self.outputs is None:
            return self._y
        both, y, bias = self.outputs(self._y), torch.empty_like(self._y), self.module.bias
        call(add_outputs, both, None if bias is None else bias.detach(), y)
        return y

    def _forward(self) -> None:
        maps = self._x.dim() == 4
        x = (as_nchw(self._x) if maps else self._x).detach()
        self._leaf = x.requires_grad_(self.needs_dx)
        kind = "cpu" if x.is_meta else x.device.type  # autocast knows no tensors without data
        narrow = self._autocast != torch.float32
        with (
            torch.enable_grad(),
            torch.autocast(kind, dtype=self._autocast, enabled=narrow),
            kernels.backend(self._backend),
        ):
            self._output = self.module.forward(self._leaf)  # the gather, a hook, was done
        y = self._output.detach()
        y = y.permute(2, 3, 0, 1) if maps else y
        if self._y is None:
            self._y = y.new_empty(y.shape, dtype=self._x.dtype)
        self._y.copy_(y)

    def backward(self, dy: Tensor | Sum, bias_partials: Tensor | None) -> Gradient:
        call(self._backward, added(dy))
        if self.gather is not None and self._dx is not None:
            return self.gather.start_reduce_scatter(self._dx.chunk(TOWERS, -1))(), None
        return self._dx, None

    def _backward(self, dy: Tensor) -> None:
        inputs = [x for x in (self._leaf, *self._parameters) if x.requires_grad]
        if not inputs:
            return
        dy = as_nchw(dy) if dy.dim() == 4 else dy
        gradients = list(torch.autograd.grad(self._output, inputs, dy.to(self._output.dtype)))
        del self._output
        if self._leaf.requires_grad:
            dx = gradients.pop(0)
            dx = dx.permute(2, 3, 0, 1) if dx.dim() == 4 else dx
            if self._dx is None:
                self._dx = dx.new_empty(dx.shape)
            self._dx.copy_(dx)
        if self.update is not None:
            self.update.torch(gradients)


def _dense(x: Tensor) -> Tensor:
    """x in contiguous memory, as kernels and transfers take it."""
    if x.is_contiguous():
        return x
    dense = x.new_empty(x.shape)
    call(dense.copy_, x)
    return dense


def _before_relu(dy: Tensor, y: Tensor | None, **options: Any) -> tuple[Tensor, Tensor | None]:
    """The gradient before the ReLU (and dropout) that made ``y``; None had none."""
    features = (-1, dy.shape[-1])
    rows = None if y is None else y.view(features)
    dz, sums = epilogue_backward(dy.view(features), rows, **options)
    assert dz is not None
    return dz.view(dy.shape), sums
