"""The layers of AlexNet as calls, on tensors without data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import fastalex_kernels as fk
from fastalex_kernels.conv2d_relu import pack_weight
from fastalex_kernels.momentum import MomentumUpdate, Updates

# name: (input channels, image, output channels, kernel, stride, padding, groups)
CONVOLUTIONS: dict[str, tuple[Any, ...]] = {
    "conv1": (3, 224, 96, 11, 4, ((0, 3), (0, 3)), 1),
    "conv2": (96, 27, 256, 5, 1, 2, 2),
    "conv3": (256, 13, 384, 3, 1, 1, 1),
    "conv4": (384, 13, 384, 3, 1, 1, 2),
    "conv5": (384, 13, 256, 3, 1, 1, 2),
}
# One of the two towers when each is a process.
TOWER_CONVOLUTIONS: dict[str, tuple[Any, ...]] = {
    "conv1": (3, 224, 48, 11, 4, ((0, 3), (0, 3)), 1),
    "conv2": (48, 27, 128, 5, 1, 2, 1),
    "conv3": (256, 13, 192, 3, 1, 1, 1),
    "conv4": (192, 13, 192, 3, 1, 1, 1),
    "conv5": (192, 13, 128, 3, 1, 1, 1),
}
# name: (channels, image, groups), and None for pooling without normalisation
POOLINGS = {"pool1": (96, 55, 2), "pool2": (256, 27, 2), "pool5": (256, 13, None)}
TOWER_POOLINGS = {"pool1": (48, 55, 1), "pool2": (128, 27, 1), "pool5": (128, 13, None)}
# name: (input features, output features, p)
LINEARS = {"fc6": (9216, 4096, 0.5), "fc7": (4096, 4096, 0.5), "fc8": (4096, 1000, 0.0)}
TOWER_LINEARS = {"fc6": (9216, 2048, 0.5), "fc7": (4096, 2048, 0.5), "fc8": (4096, 500, 0.0)}

Step = Callable[[], object]


def _leaf(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def _forward_and_backward(output: torch.Tensor) -> None:
    output.backward(torch.empty_like(output))


def _convolution(spec: tuple[Any, ...], batch: int, dtype: torch.dtype) -> None:
    c, image, k, size, stride, padding, groups = spec
    x = _leaf(dtype, batch, c, image, image).requires_grad_(c != 3)  # images have no gradient
    w, b = _leaf(dtype, k, c // groups, size, size), _leaf(dtype, k)
    _forward_and_backward(fk.conv2d_relu(x, w, b, stride, padding, groups))


def _augmented(outputs: int, batch: int, dtype: torch.dtype) -> None:
    """The first convolution on what the augmentation writes: the training step's beginning."""
    images = torch.empty(batch, 256, 256, 3, dtype=torch.uint8)
    tops, mirrors = torch.empty(batch, dtype=torch.int64), torch.empty(batch, dtype=torch.bool)
    mean, colors = torch.empty(256, 256, 3), torch.empty(batch, 3)
    x = fk.augment(
        images, tops, tops, mirrors, colors, mean,
        padding=((0, 3), (0, 3)), space_to_depth=4, dtype=dtype,
    )  # fmt: skip
    w, b = _leaf(dtype, outputs, 3, 11, 11), _leaf(dtype, outputs)
    _forward_and_backward(fk.conv2d_relu_space_to_depth(x, w, b))


def _pooling(spec: tuple[int, int, int | None], batch: int, dtype: torch.dtype) -> None:
    c, image, groups = spec
    x = _leaf(dtype, batch, c, image, image)
    _forward_and_backward(
        fk.max_pool2d(x) if groups is None else fk.lrn_max_pool2d(x, groups=groups)
    )


def _linear(spec: tuple[int, int, float], batch: int, dtype: torch.dtype) -> None:
    inputs, outputs, p = spec
    x, w, b = _leaf(dtype, batch, inputs), _leaf(dtype, outputs, inputs), _leaf(dtype, outputs)
    rng = torch.empty(2, dtype=torch.int64)
    _forward_and_backward(fk.linear_relu_dropout(x, w, b, p, relu=p > 0, rng=rng))


def _updated(
    call: Callable[..., torch.Tensor], x: torch.Tensor, *shape: int, stride: int = 1
) -> torch.Tensor:
    """A layer that applies its gradients in backward, with a copy for the products."""
    w, b = _leaf(torch.float32, *shape), _leaf(torch.float32, shape[0])
    if len(shape) == 4 and stride == 1:
        w = pack_weight(w.detach()).permute(3, 2, 0, 1).requires_grad_()
    made = []
    for parameter in (w, b):
        pack = partial(pack_weight, stride=stride) if parameter.dim() == 4 else torch.detach
        operand = torch.empty(pack(parameter.detach()).shape, dtype=x.dtype)
        velocity = torch.empty_like(parameter.detach())
        made.append(MomentumUpdate(parameter, velocity, torch.empty(3), "paper", operand, pack))
    return call(x, w, b, update=Updates(*made))


def _updated_convolution(spec: tuple[Any, ...], batch: int, dtype: torch.dtype) -> torch.Tensor:
    c, image, k, size, stride, padding, groups = spec
    x = _leaf(dtype, batch, c, image, image).requires_grad_(c != 3)
    call = partial(fk.conv2d_relu, stride=stride, padding=padding, groups=groups)
    return _updated(call, x, k, c // groups, size, size, stride=stride)


def _updated_linear(spec: tuple[int, int, float], batch: int, dtype: torch.dtype) -> torch.Tensor:
    inputs, outputs, p = spec
    call = partial(fk.linear_relu_dropout, p=p, relu=p > 0, rng=torch.empty(2, dtype=torch.int64))
    return _updated(call, _leaf(dtype, batch, inputs), outputs, inputs)


def layers(batch: int, dtype: torch.dtype, towers: bool = False) -> dict[str, Step]:
    """Each layer's forward and backward by name, to be recorded by ``fastalex.offline``."""
    steps: dict[str, Step] = {}
    tables: list[tuple[dict[str, Any], Callable[..., None]]] = [
        (TOWER_CONVOLUTIONS if towers else CONVOLUTIONS, _convolution),
        (TOWER_POOLINGS if towers else POOLINGS, _pooling),
        (TOWER_LINEARS if towers else LINEARS, _linear),
    ]
    for table, run in tables:
        for name, spec in table.items():
            steps[name] = lambda run=run, spec=spec: run(spec, batch, dtype)
    maps = (TOWER_CONVOLUTIONS if towers else CONVOLUTIONS)["conv1"][2]
    convolutions, linears = tables[0][0], tables[2][0]
    for name in ("conv1", "conv5"):
        spec = convolutions[name]
        steps[f"{name} updated"] = lambda spec=spec: _forward_and_backward(
            _updated_convolution(spec, batch, dtype)
        )
    for name in ("fc6", "fc8"):
        spec = linears[name]
        steps[f"{name} updated"] = lambda spec=spec: _forward_and_backward(
            _updated_linear(spec, batch, dtype)
        )
    steps["augment"] = lambda: _augmented(maps, batch, dtype)
    return steps


def masked(batch: int, dtype: torch.dtype) -> dict[str, Step]:
    """Layers whose ReLU's mask is applied by the layer behind them, with that one, by its name."""

    def behind(name: str, layer: Callable[[torch.Tensor], torch.Tensor]) -> Step:
        def step() -> None:
            if name in LINEARS:
                y = _updated_linear(LINEARS[name], batch, dtype)
            else:
                y = _updated_convolution(CONVOLUTIONS[name], batch, dtype)
            _forward_and_backward(layer(y))

        return step

    def convolution(y: torch.Tensor) -> torch.Tensor:
        _, _, k, size, _, padding, groups = CONVOLUTIONS["conv5"]
        w = _leaf(dtype, k, y.shape[1] // groups, size, size)
        return fk.conv2d_relu(y, w, padding=padding, groups=groups)

    def linear(outputs: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda y: fk.linear_relu_dropout(y, _leaf(dtype, outputs, y.shape[1]), p=0.0)

    return {
        "pool2": behind("conv2", partial(fk.lrn_max_pool2d, groups=2)),
        "conv5": behind("conv4", convolution),
        "pool5": behind("conv5", fk.max_pool2d),
        "fc7": behind("fc6", linear(4096)),
        "fc8": behind("fc7", linear(1000)),
    }
