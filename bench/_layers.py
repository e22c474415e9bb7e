"""Each layer of the published net, ours and stock torch's, with its input and what it has to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import fastalex_kernels as kernels
from fastalex import AlexNet
from fastalex.layers import LinearReLUDropout, LRNMaxPool2d, MaxPool2d
from fastalex.reference import ReferenceAlexNet

from ._timing import Work

# name: part of the net, index of our layer, indices of stock torch's
LAYERS = {
    "conv1": ("features", 0, slice(0, 2)),
    "norm-pool1": ("features", 2, slice(2, 3)),
    "conv2": ("features", 3, slice(3, 5)),
    "norm-pool2": ("features", 5, slice(5, 6)),
    "conv3": ("features", 6, slice(6, 8)),
    "conv4": ("features", 8, slice(8, 10)),
    "conv5": ("features", 10, slice(10, 12)),
    "pool5": ("features", 12, slice(12, 13)),
    "fc6": ("classifier", 1, slice(1, 4)),
    "fc7": ("classifier", 4, slice(4, 6)),
    "fc8": ("classifier", 6, slice(6, 7)),
}
# ||out - float64|| / ||float64||. In float32 rounding grows as the square root of a sum's length,
# from 1000 products on; bfloat16 keeps 8 bits of the result.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 8e-3}
# Stock torch rounds between its operations: enough to see that it computes the same function.
STOCK_TOLERANCE = 3e-2
_NEAR_TIE = 1e-4

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """A layer of the net with an input for it.

    ``input`` is [N, C, H, W] or [N, features], contiguous, not negative where a ReLU or a pooling
    stands before, and needs a gradient unless it is the images.
    """

    name: str
    ours: nn.Module
    stock: nn.Module
    input: torch.Tensor

    def tensors(self, input: torch.Tensor, module: nn.Module) -> list[torch.Tensor]:
        """Those that a backward pass gives a gradient."""
        return [t for t in (input, *module.parameters()) if t.requires_grad]

    def work(self, direction: str, output: torch.Tensor) -> Work:
        """Of the forward or backward pass that has or had ``output``."""
        x, y, size = self.input.numel(), output.numel(), self.input.element_size()
        weights = [p for p in self.ours.parameters() if p.dim() > 1]
        products = sum(2 * w.numel() * (y // w.shape[0]) for w in weights)
        w = sum(p.numel() for p in weights)
        if direction == "forward":
            return Work(products, size * (x + w + y))
        if not weights:  # the gradients; the normalisation needs its input again
            reads = 1 if isinstance(self.ours, LRNMaxPool2d) else 0
            return Work(0, size * ((reads + 1) * x + y))
        gradients = 2 if self.input.requires_grad else 1
        return Work(gradients * products, size * (gradients * (x + w) + y))


def make_layers(batch: int, device: str, dtype: torch.dtype) -> dict[str, Layer]:
    """The layers of the ``paper`` net, one set of weights for both."""
    torch.manual_seed(0)
    ours, stock = AlexNet(variant="paper"), ReferenceAlexNet(variant="paper")
    ours.init_parameters("he")
    stock.load_state_dict(ours.state_dict())
    ours, stock = ours.to(device, dtype), stock.to(device, dtype)
    ours.seed_dropout(seed=0, step=0)
    layers, shape = {}, (3, 224, 224)
    for name, (part, index, indices) in LAYERS.items():
        values = torch.randn(batch, *shape)
        x = (values if name == "conv1" else values.relu()).to(device, dtype)
        x.requires_grad_(name != "conv1")
        layer = Layer(name, getattr(ours, part)[index], getattr(stock, part)[indices], x)
        layers[name] = layer
        with torch.no_grad():
            shape = tuple(layer.stock(x[:1]).shape[1:])
        shape = (shape[0] * 36,) if name == "pool5" else shape
    return layers


def laid_out(x: torch.Tensor, backend: str) -> torch.Tensor:
    """The values of ``x`` as the layer before leaves them in memory under a backend of ours."""
    if x.dim() == 2 or not x.requires_grad:  # rows, and the images, come contiguous
        return x
    values = x.detach()
    if backend == "triton":
        values = values.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    else:
        values = values.contiguous(memory_format=torch.channels_last)
    return values.requires_grad_()


def gradient_like(output: torch.Tensor) -> torch.Tensor:
    """Normal values in the memory layout of ``output``, the same for every layout."""
    generator = torch.Generator().manual_seed(1)
    return torch.empty_like(output).copy_(torch.randn(output.shape, generator=generator))


def check(layer: Layer, backend: str) -> dict[str, float]:
    """Compare our layer with float64, forward and every gradient, and stock torch's forward.

    Where the sign of a sum or the larger of two values is within rounding, either gradient is
    right: those outputs get none.

    Returns:
        The largest relative error by direction.

    Raises:
        AssertionError: past the tolerances.
    """
    x = laid_out(layer.input, backend)
    wide_x = layer.input.detach().double().requires_grad_(layer.input.requires_grad)
    wide_stock = copy.deepcopy(layer.stock).double()
    oracle, wide_module = wide_stock, wide_stock
    if isinstance(layer.ours, LinearReLUDropout):
        oracle, wide_module = _dropout_oracle(layer.ours)
    with kernels.backend(backend):
        output = layer.ours(x)
    expected = oracle(wide_x)
    settled = (output > 0) == (expected > 0)
    if isinstance(layer.ours, MaxPool2d):
        settled = _one_maximum(wide_stock, wide_x)
    dy = gradient_like(output) * settled
    tensors = layer.tensors(x, layer.ours)
    found = torch.autograd.grad(output, tensors, dy)
    wanted = torch.autograd.grad(expected, layer.tensors(wide_x, wide_module), dy.double())
    errors = {"forward": relative_error(output, expected), "backward": 0.0}
    assert errors["forward"] <= _tolerance(layer, output), (layer.name, "output", errors)
    for gradient, reference in zip(found, wanted, strict=True):
        error = relative_error(gradient, reference)
        errors["backward"] = max(error, errors["backward"])
        assert error <= _tolerance(layer, output), (layer.name, tuple(gradient.shape), error)
    layer.stock.eval()
    wide_stock.eval()
    difference = relative_error(layer.stock(layer.input), wide_stock(wide_x))
    assert difference <= STOCK_TOLERANCE, (layer.name, "stock", difference)
    layer.stock.train()
    return errors


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """||out - ref|| / ||ref||."""
    out, ref = out.detach().double(), ref.detach().double()
    return float((out - ref).norm() / ref.norm())


def _dropout_oracle(ours: LinearReLUDropout) -> tuple[Forward, nn.Module]:
    """The layer in float64 with the mask of its counter, and the module with its parameters."""
    wide = nn.Linear(ours.in_features, ours.out_features, device="meta", dtype=torch.float64)
    wide.weight = nn.Parameter(ours.weight.detach().double())
    wide.bias = nn.Parameter(ours.bias.detach().double())

    def forward(x: torch.Tensor) -> torch.Tensor:
        return kernels.reference.linear_relu_dropout(
            x, wide.weight, wide.bias, p=ours.p, rng=ours.rng
        )

    return forward, wide


def _one_maximum(stock: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Which windows of a pooling, 3 x 3 with stride 2, have no second value near the largest."""
    with torch.no_grad():
        *before, _ = [m for m in stock.modules() if not isinstance(m, nn.Sequential)]
        for module in before:
            x = module(x)
        windows = x.unfold(2, 3, 2).unfold(3, 3, 2).flatten(-2)
        first, second = windows.topk(2, dim=-1).values.unbind(-1)
        return first - second > _NEAR_TIE * first


def _tolerance(layer: Layer, output: torch.Tensor) -> float:
    """For the longest sum of the layer's products, over a window or over the batch's outputs."""
    bound = TOLERANCES[output.dtype]
    weights = [p for p in layer.ours.parameters() if p.dim() > 1]
    if output.dtype != torch.float32 or not weights:
        return bound
    (w,) = weights
    length = max(w[0].numel(), w.numel() // w.shape[1], output.numel() // w.shape[0])
    return bound * max(1.0, (length / 1000) ** 0.5)
