"""The layers of a training step on a CPU, by torch's operators, in as few passes as there can be.

A pass is one parallel region: threads wait for each other where it ends and nowhere else, so that
a core which another process keeps busy holds up little. Everything before the rows is one pass, in
which a thread takes some images through all layers. A weight of rows is updated block by block,
each while its gradient is in the cache; the gradient as a whole is never written.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

import fastalex_kernels as kernels
from fastalex.model.layers import Linear, LinearReLUDropout
from fastalex.training.passes import Gradient, Pass, Sum, Torch, added
from fastalex.training.updates import FusedUpdate
from fastalex_kernels.common.launch import call
from fastalex_kernels.common.layout import as_nchw
from fastalex_kernels.common.threads import share

Tensor = torch.Tensor

_IMAGES = 8  # taken through the layers at a time: fewer would make more gradients to add up


class Maps(Pass):
    """All layers of maps, by autograd; its output is rows.

    Args:
        layers: in order.
        updates: of those that have parameters.
    """

    def __init__(self, layers: Sequence[nn.Module], updates: Sequence[FusedUpdate]) -> None:
        self._layers, self._updates = layers, updates
        self._parameters = [p for update in updates for p in update.parameters()]
        self._y: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        call(self._forward, x)
        assert self._y is not None
        return self._y

    @torch.no_grad()
    def _forward(self, x: Tensor) -> None:
        images = as_nchw(x)
        parts = max(len(images) // _IMAGES, min(len(images), torch.get_num_threads()), 1)
        self._rows = share(self._rows_of, images.tensor_split(parts))
        y = torch.cat(self._rows).detach()
        self._y = y if self._y is None else self._y.copy_(y)

    def _rows_of(self, images: Tensor) -> Tensor:
        with torch.enable_grad(), kernels.backend("aten"):
            for layer in self._layers:
                images = layer.forward(images)
            return images.flatten(1)

    def backward(self, dy: Tensor | Sum, bias_partials: Tensor | None) -> Gradient:
        call(self._backward, added(dy))
        return None, None

    @torch.no_grad()
    def _backward(self, dy: Tensor) -> None:
        rows, self._rows = self._rows, []
        parts = share(self._gradients_of, rows, dy.tensor_split(len(rows)))
        for other in parts[1:]:
            torch._foreach_add_(parts[0], other)
        gradients = iter(parts[0])
        for update in self._updates:
            update.torch([next(gradients) for _ in update.parameters()])

    def _gradients_of(self, rows: Tensor, dy: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(rows, self._parameters, dy))


class Rows(Pass):
    """Fully connected + bias, with ReLU and dropout but in the last layer."""

    def __init__(self, layer: Linear | LinearReLUDropout, update: FusedUpdate) -> None:
        self._layer, self._update = layer, update
        self._relu = isinstance(layer, LinearReLUDropout)

    def forward(self, x: Tensor) -> Tensor:
        self._x, self._dx = x, torch.empty_like(x)
        self._y = x.new_empty((len(x), self._layer.out_features))
        call(self._forward)
        return self._y

    @torch.no_grad()
    def _forward(self) -> None:
        layer, y = self._layer, self._y
        product = F.conv2d(_image(layer.weight), _kernel(self._x))
        torch.add(product[0, :, :, 0], layer.bias, out=y)
        self._scale = 1.0
        if self._relu:
            y.relu_()
        if isinstance(layer, LinearReLUDropout) and layer.p and layer.dropping:
            self._scale = 1.0 / (1.0 - layer.p)
            some = -(-len(y) // torch.get_num_threads())
            share(functools.partial(_drop, layer), range(0, len(y), some), torch.split(y, some))

    def backward(self, dy: Tensor | Sum, bias_partials: Tensor | None) -> Gradient:
        call(self._backward, added(dy))
        return self._dx, None

    @torch.no_grad()
    def _backward(self, dy: Tensor) -> None:
        dz = dy
        if self._relu:  # what was dropped is zero too
            dz = torch.ops.aten.threshold_backward(dy, self._y, 0).mul_(self._scale)
        given = _image(dz.t()), _image(self._layer.weight.detach()), _kernel(self._x)
        shape = None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1
        _, dx, _ = torch.ops.aten.convolution_backward(*given, *shape, (False, True, False))
        self._dx.copy_(dx[:, :, 0, 0])
        self._update.product(dz, self._x)


def _drop(layer: LinearReLUDropout, first: int, rows: Tensor) -> None:
    rng, row, feature = layer.mask
    rows.copy_(kernels.dropout(rows, layer.p, True, rng, row + first, feature))


# A product of few rows as a convolution with one tap, in which a pixel is a row of the weight: its
# kernels keep to memory's pace where those for matrices take two or three times as long.


def _image(rows: Tensor) -> Tensor:
    return rows[None, :, None].permute(0, 3, 1, 2)


def _kernel(rows: Tensor) -> Tensor:
    return rows[:, :, None, None]


def cpu_passes(
    layers: Sequence[tuple[str, nn.Module | None]], by_layer: dict[nn.Module, FusedUpdate]
) -> list[tuple[str, Pass]]:
    """The passes of a whole net in float32.

    Args:
        layers: by name; None stands for the flattening.
        by_layer: what becomes of a layer's gradients.
    """
    end = [layer for _, layer in layers].index(None)
    maps = [layer for _, layer in layers[:end] if layer is not None]
    updates = [by_layer[layer] for layer in maps if layer in by_layer]
    passes: list[tuple[str, Pass]] = [("features", Maps(maps, updates))]
    for name, layer in layers[end + 1 :]:
        assert layer is not None
        update = by_layer.get(layer)
        if isinstance(layer, Linear) or (
            isinstance(layer, LinearReLUDropout) and layer.groups == 1
        ):
            assert update is not None
            passes.append((name, Rows(layer, update)))
        else:
            passes.append((name, Torch(layer, update, None, torch.float32)))
    return passes
