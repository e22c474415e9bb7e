"""Each layer of a published net, ours and stock torch's, with an input, and both compared.

What is timed or tuned is compared with float64 first; this is the comparison.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

import fastalex_kernels as kernels
from fastalex.inspection.cost import Floor, floors
from fastalex.inspection.record import Layer, layers_of
from fastalex.model.alexnet import AlexNet, layer_names
from fastalex.model.layers import Conv2dReLU, LinearReLUDropout, MaxPool2d
from fastalex.model.reference import ReferenceAlexNet
from fastalex.training.layer_check import single_maxima
from fastalex_kernels.common.tuned import dot_precision
from fastalex_kernels.reference import relative_error, tolerance

# Stock torch rounds between its operations: enough to see that it computes the same function.
STOCK_TOLERANCE = 3e-2

Forward = Callable[[torch.Tensor], torch.Tensor]


class WrongResult(ValueError):
    """What was to be timed computes something else; the message says by how much."""


@dataclass(frozen=True)
class LayerPair:
    """A layer of the net with an input for it.

    ``input`` is [N, C, H, W] or [N, features], contiguous, not negative where a ReLU or a pooling
    stands before, and needs a gradient unless it is the images. ``layers`` are those inside.
    """

    name: str
    ours: nn.Module
    stock: nn.Module
    input: torch.Tensor
    layers: tuple[Layer, ...]

    def tensors(self, input: torch.Tensor, module: nn.Module) -> list[torch.Tensor]:
        """Those that a backward pass gives a gradient."""
        return [t for t in (input, *module.parameters()) if t.requires_grad]


def pair_names(variant: str = "paper") -> list[str]:
    """The names of the pairs of a variant, in order: ``"conv1"``, ``"pool1"``, ... ``"fc8"``."""
    with torch.device("meta"):
        return list(_blocks(AlexNet(variant=variant)))


def _blocks(net: AlexNet) -> dict[str, tuple[str, int]]:
    """Part and index of each child of the net that computes, by the last layer's name in it."""
    names = {id(module): name for name, module in layer_names(net).items()}
    blocks: dict[str, tuple[str, int]] = {}
    for part in ("features", "classifier"):
        for index, child in enumerate(net.get_submodule(part).children()):
            inside = [names[id(module)] for module in child.modules() if id(module) in names]
            if inside and not inside[-1].startswith("dropout"):
                blocks[inside[-1]] = (part, index)
    return blocks


def make_nets(
    variant: str, device: torch.device | str, dtype: torch.dtype
) -> tuple[AlexNet, ReferenceAlexNet]:
    """Ours and stock torch's with one set of weights."""
    torch.manual_seed(0)
    ours, stock = AlexNet(variant=variant), ReferenceAlexNet(variant=variant)
    ours.init_parameters("he")
    stock.load_state_dict(ours.state_dict())
    weight = next(ours.parameters())
    if (weight.device, weight.dtype) != (torch.device(device), dtype):  # fake ones can't move
        ours, stock = ours.to(device, dtype), stock.to(device, dtype)
    ours.seed_dropout(seed=0, step=0)
    return ours, stock


def make_pairs(
    batch: int, nets: tuple[AlexNet, ReferenceAlexNet], image_size: int | None = None
) -> dict[str, LayerPair]:
    """The layers of a net and its reference by name, each with an input of its own.

    Args:
        batch: images.
        nets: from ``make_nets``.
        image_size: side of the images in pixels; None is the variant's own.
    """
    ours, stock = nets
    weight, side = next(ours.parameters()), image_size or ours.variant.image_size
    layers = layers_of(ours, batch, side)
    blocks = _blocks(ours)
    pairs: dict[str, LayerPair] = {}
    signed = True
    for name, (part, index) in blocks.items():
        module = ours.get_submodule(f"{part}.{index}")
        inside = tuple(x for x in layers.values() if x.module in set(module.modules()))
        values = torch.randn(inside[0].input)
        x = (values if signed else values.relu()).to(weight.device, weight.dtype)
        x.requires_grad_(bool(pairs))
        signed = isinstance(module, Conv2dReLU) and not module.relu
        after = [i for p, i in blocks.values() if p == part and i > index]
        stretch = slice(index, min(after, default=None))
        same: nn.Module = stock.get_submodule(part)[stretch]  # type: ignore[index]
        pairs[name] = LayerPair(name, module, same, x, inside)
    return pairs


def pair_floors(pairs: Mapping[str, LayerPair]) -> dict[tuple[str, str], Floor]:
    """The least work of a pass in training, by name and ``"forward"`` or ``"backward"``.

    A pair of several layers has none.

    Args:
        pairs: all of a net's, in order.
    """
    layers = {layer.name: layer for pair in pairs.values() for layer in pair.layers}
    itemsize = next(iter(pairs.values())).input.element_size()
    result: dict[tuple[str, str], Floor] = {}
    for (name, role), floor in floors(layers, itemsize, train=True).items():
        if name not in pairs or len(pairs[name].layers) > 1:
            continue
        key = (name, "forward" if role == "forward" else "backward")
        before = result.get(key, Floor(0.0, 0.0))
        result[key] = Floor(before.flops + floor.flops, before.size + floor.size)
    return result


def as_stored(x: torch.Tensor, backend: str) -> torch.Tensor:
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


def make_call(pair: LayerPair, how: str, direction: str) -> Callable[[], object]:
    """One pass of a layer, to be timed.

    Args:
        how: ``"stock"``, torch's layers; ``"compiled"``, those under torch.compile; or a backend,
            under which our layer runs.
        direction: ``"forward"``, or ``"backward"``, which can be called many times.
    """
    module, x = pair.ours, pair.input
    if how in ("stock", "compiled"):
        module = torch.compile(pair.stock) if how == "compiled" else pair.stock  # type: ignore[assignment]
    else:
        x = as_stored(x, how)

    def forward() -> torch.Tensor:
        with kernels.backend(how if module is pair.ours else "auto"):
            return module(x)  # type: ignore[no-any-return]

    if direction == "forward":
        return forward
    output = forward()
    dy, tensors = gradient_like(output), pair.tensors(x, module)
    return lambda: torch.autograd.grad(output, tensors, dy, retain_graph=True)


def check(pair: LayerPair, backend: str) -> dict[str, float]:
    """Compare our layer with float64, forward and every gradient, and stock torch's forward.

    Where the sign of a sum or the larger of two values is within rounding, either gradient is
    right: those outputs get none.

    Args:
        pair: what is compared.
        backend: under which our layer runs.

    Returns:
        The largest relative error by direction.

    Raises:
        WrongResult: past the tolerances.
    """
    x = as_stored(pair.input, backend)
    wide_x = pair.input.detach().double().requires_grad_(pair.input.requires_grad)
    wide_stock = copy.deepcopy(pair.stock).double()
    oracle: Forward = wide_stock
    wide_module = wide_stock
    if isinstance(pair.ours, LinearReLUDropout):
        oracle, wide_module = _dropout_oracle(pair.ours)
    with kernels.backend(backend):
        output = pair.ours(x)
    expected = oracle(wide_x)
    decided = (output > 0) == (expected > 0)
    if any(isinstance(module, MaxPool2d) for module in pair.ours.modules()):
        decided &= _one_maximum(wide_stock, wide_x)
    dy = gradient_like(output) * decided
    found = torch.autograd.grad(output, pair.tensors(x, pair.ours), dy)
    wanted = torch.autograd.grad(expected, pair.tensors(wide_x, wide_module), dy.double())
    bound = _tolerance(pair, output)
    errors = {"forward": relative_error(output, expected), "backward": 0.0}
    _hold(errors["forward"], bound, f"{pair.name}: output")
    for gradient, reference in zip(found, wanted, strict=True):
        error = relative_error(gradient, reference)
        errors["backward"] = max(error, errors["backward"])
        _hold(error, bound, f"{pair.name}: gradient of shape {tuple(gradient.shape)}")
    pair.stock.eval()
    wide_stock.eval()
    difference = relative_error(pair.stock(pair.input), wide_stock(wide_x))
    pair.stock.train()
    _hold(difference, STOCK_TOLERANCE, f"{pair.name}: stock torch")
    return errors


def _hold(error: float, bound: float, what: str) -> None:
    if not error <= bound:  # NaN is wrong too
        raise WrongResult(f"{what} is {error:.1e} away from float64, allowed are {bound:.1e}")


def _dropout_oracle(ours: LinearReLUDropout) -> tuple[Forward, nn.Module]:
    """The layer in float64 with the mask of its counter, and the module with its parameters."""
    wide = nn.Linear(ours.in_features, ours.out_features, device="meta", dtype=torch.float64)
    wide.weight = nn.Parameter(ours.weight.detach().double())
    wide.bias = nn.Parameter(ours.bias.detach().double())

    def forward(x: torch.Tensor) -> torch.Tensor:
        return kernels.reference.linear_relu_dropout(
            x, wide.weight, wide.bias, p=ours.p, rng=ours.mask.rng
        )

    return forward, wide


def _one_maximum(stock: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Which windows of the pooling in ``stock`` have no second value near the largest."""
    modules = [m for m in stock.modules() if not isinstance(m, nn.Sequential)]
    at = next(i for i, m in enumerate(modules) if isinstance(m, nn.MaxPool2d))
    pool = modules[at]
    assert isinstance(pool, nn.MaxPool2d)
    with torch.no_grad():
        for module in modules[:at]:
            x = module(x)
        size, stride = pool.kernel_size, pool.stride
        assert isinstance(size, int)
        assert isinstance(stride, int)
        height, width = pool(x).shape[2:]
        return single_maxima(x, size, stride, (height, width))


def _tolerance(pair: LayerPair, output: torch.Tensor) -> float:
    """For the longest sum of the layer's products, over a window or over the batch's outputs."""
    weights = [p for p in pair.ours.parameters() if p.dim() > 1]
    if not weights:
        return tolerance(output.dtype, 0)
    (w,) = weights
    length = max(w[0].numel(), w.numel() // w.shape[1], output.numel() // w.shape[0])
    return tolerance(output.dtype, length, dot_precision(w, "linear" if w.dim() == 2 else "conv2d"))
