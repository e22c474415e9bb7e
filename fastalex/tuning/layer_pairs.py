"""A layer of ours beside stock torch's, on one input, checked before it is timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import nn

import fastalex_kernels as kernels
from fastalex.inspection.cost import Floor, floors
from fastalex.inspection.record import layers_of
from fastalex.model.alexnet import AlexNet, ReferenceAlexNet
from fastalex.model.layers import Conv2dReLU, Dropout
from fastalex.training.layer_check import single_maxima
from fastalex_kernels.common.tuned import dot_precision
from fastalex_kernels.reference import relative_error, tolerance

# Stock torch rounds between its operations: enough to see that it computes the same function.
STOCK_TOLERANCE = 3e-2


class WrongResult(ValueError):
    """What was to be timed computes something else; the message says by how much."""


class LayerPair(NamedTuple):
    """A layer of a published net with an input for it.

    ``input`` is [N, C, H, W] or [N, features], contiguous, not negative where a ReLU or a pooling
    stands before, and needs a gradient unless it is the images. ``floors`` are the least work of
    training, by ``"forward"`` and ``"backward"``; a pair of several layers has none.
    """

    name: str
    ours: nn.Module
    stock: nn.Module
    input: torch.Tensor
    floors: dict[str, Floor]

    def tensors(self, input: torch.Tensor, module: nn.Module) -> list[torch.Tensor]:
        """Those that a backward pass gives a gradient."""
        return [t for t in (input, *module.parameters()) if t.requires_grad]


def pair_names(variant: str) -> list[str]:
    """The names of a variant's pairs in order: ``"conv1"``, ``"pool1"``, ... ``"fc8"``."""
    return list(make_pairs(1, variant, "meta", torch.float32))


def make_pairs(
    batch: int,
    variant: str,
    device: torch.device | str,
    dtype: torch.dtype,
    image_size: int | None = None,
) -> dict[str, LayerPair]:
    """The layers of a net by name, each with an input of its own and stock torch's beside it.

    Args:
        batch: images.
        variant: of ``AlexNet``.
        device, dtype: of weights and inputs.
        image_size: side of the images in pixels; None is the variant's own.
    """
    torch.manual_seed(0)
    with torch.device("meta" if str(device) == "meta" else "cpu"):
        ours, stock = AlexNet(variant=variant), ReferenceAlexNet(variant=variant)
    ours.init_parameters("he")
    stock.load_state_dict(ours.state_dict())
    ours.to(device, dtype), stock.to(device, dtype)
    ours.seed_dropout(seed=0, step=0)
    layers = layers_of(ours, batch, image_size or ours.variant.image_size)
    of_module = {layer.module: layer for layer in layers.values()}
    least = floors(layers, dtype.itemsize, train=True)
    pairs: dict[str, LayerPair] = {}
    signed = True
    for part in ("features", "classifier"):
        blocks = _blocks(ours.get_submodule(part), of_module)
        for index, end in zip(blocks, [*list(blocks)[1:], None], strict=True):
            inside = [of_module[module] for module in blocks[index]]
            values = torch.randn(inside[0].input)
            x = (values if signed else values.relu()).to(device, dtype).requires_grad_(bool(pairs))
            module = ours.get_submodule(f"{part}.{index}")
            signed = isinstance(module, Conv2dReLU) and not module.relu
            same: nn.Module = stock.get_submodule(part)[index:end]  # type: ignore[index]
            work = _floors(least, inside[0].name) if len(inside) == 1 else {}
            pairs[inside[-1].name] = LayerPair(inside[-1].name, module, same, x, work)
    return pairs


def _blocks(part: nn.Module, layers: Collection[object]) -> dict[int, list[nn.Module]]:
    """The layers inside of each child that computes more than dropout, by its index."""
    found = {}
    for index, child in enumerate(part.children()):
        inside = [module for module in child.modules() if module in layers]
        if inside and not isinstance(inside[-1], Dropout):
            found[index] = inside
    return found


def _floors(least: dict[tuple[str, str], Floor], layer: str) -> dict[str, Floor]:
    result: dict[str, Floor] = {}
    for (name, role), floor in least.items():
        if name == layer:
            key = "forward" if role == "forward" else "backward"
            before = result.get(key, Floor(0.0, 0.0))
            result[key] = Floor(before.flops + floor.flops, before.size + floor.size)
    return result


def _templates_alone() -> dict[str, Any]:
    """Inductor's options for its Triton templates, those that this torch has."""
    known = torch._inductor.list_options()
    kinds = ("gemm", "conv", "conv_bwd_input", "conv_bwd_weight")
    names = (f"max_autotune_{kind}_backends" for kind in kinds)
    return {"max_autotune": True} | {name: "TRITON" for name in names if name in known}


def make_call(pair: LayerPair, how: str, direction: str) -> Callable[[], object]:
    """One pass of a layer, to be timed.

    Args:
        how: ``"stock"``, torch's layers; ``"compiled"``, those under torch.compile;
            ``"templates"``, of whose products Inductor has only its Triton templates; or a backend,
            under which our layer runs.
        direction: ``"forward"``, or ``"backward"``, which can be called many times.
    """
    module, x = pair.ours, pair.input
    if how in ("stock", "compiled", "templates"):
        module = pair.stock
        if how != "stock":
            options = _templates_alone() if how == "templates" else None
            module = torch.compile(module, options=options)  # type: ignore[assignment]
    else:
        x = _as_stored(x, how)

    def forward() -> torch.Tensor:
        with kernels.backend(how if module is pair.ours else "auto"):
            return module(x)  # type: ignore[no-any-return]

    if direction == "forward":
        return forward
    output = forward()
    dy, tensors = _gradient_like(output), pair.tensors(x, module)
    return lambda: torch.autograd.grad(output, tensors, dy, retain_graph=True)


def _as_stored(x: torch.Tensor, backend: str) -> torch.Tensor:
    """The values of ``x`` as the layer before leaves them in memory under a backend of ours."""
    if x.dim() == 2 or not x.requires_grad:  # rows, and the images, come contiguous
        return x
    values = x.detach()
    if backend == "triton":
        values = values.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    else:
        values = values.contiguous(memory_format=torch.channels_last)
    return values.requires_grad_()


def _gradient_like(output: torch.Tensor) -> torch.Tensor:
    """Normal values in the memory layout of ``output``, the same for every layout."""
    generator = torch.Generator().manual_seed(1)
    return torch.empty_like(output).copy_(torch.randn(output.shape, generator=generator))


def check(pair: LayerPair, backend: str) -> dict[str, float]:
    """Compare our layer with float64, forward and every gradient, and stock torch's forward.

    Dropout is off. Where the sign of a sum or the larger of two values is within rounding, either
    gradient is right: those outputs get none.

    Args:
        pair: what is compared.
        backend: under which our layer runs.

    Returns:
        The largest relative error by direction.

    Raises:
        WrongResult: past the tolerances.
    """
    x, wide = _as_stored(pair.input, backend), copy.deepcopy(pair.stock).double()
    wide_x = pair.input.detach().double().requires_grad_(pair.input.requires_grad)
    pooled: list[tuple[nn.MaxPool2d, torch.Tensor]] = []
    for module in wide.modules():
        if isinstance(module, nn.MaxPool2d):
            module.register_forward_pre_hook(lambda of, given: pooled.append((of, given[0])))
    for net in (pair.ours, pair.stock, wide):
        net.eval()
    with kernels.backend(backend):
        output = pair.ours(x)
    expected = wide(wide_x)
    decided = (output > 0) == (expected > 0)
    for pool, maps in pooled:
        size, stride = (int(x) for x in (pool.kernel_size, pool.stride))  # type: ignore[arg-type]
        height, width = output.shape[2:]
        decided &= single_maxima(maps.detach(), size, stride, (height, width))
    dy = _gradient_like(output) * decided
    found = torch.autograd.grad(output, pair.tensors(x, pair.ours), dy)
    wanted = torch.autograd.grad(expected, pair.tensors(wide_x, wide), dy.double())
    bound = _tolerance(pair, output)
    errors = {"forward": _hold(output, expected, bound, f"{pair.name}: output"), "backward": 0.0}
    for gradient, reference in zip(found, wanted, strict=True):
        what = f"{pair.name}: gradient of shape {tuple(gradient.shape)}"
        errors["backward"] = max(errors["backward"], _hold(gradient, reference, bound, what))
    _hold(pair.stock(pair.input), expected, STOCK_TOLERANCE, f"{pair.name}: stock torch")
    for net in (pair.ours, pair.stock):
        net.train()
    return errors


def _hold(found: torch.Tensor, expected: torch.Tensor, bound: float, what: str) -> float:
    error = relative_error(found, expected)
    if not error <= bound:  # NaN is wrong too
        raise WrongResult(f"{what} is {error:.1e} away from float64, allowed are {bound:.1e}")
    return error


def _tolerance(pair: LayerPair, output: torch.Tensor) -> float:
    """For the longest sum of the layer's products, over a window or over the batch's outputs."""
    weights = [p for p in pair.ours.parameters() if p.dim() > 1]
    if not weights:
        return tolerance(output.dtype, 0)
    (w,) = weights
    length = max(w[0].numel(), w.numel() // w.shape[1], output.numel() // w.shape[0])
    return tolerance(output.dtype, length, dot_precision(w, "linear" if w.dim() == 2 else "conv2d"))
