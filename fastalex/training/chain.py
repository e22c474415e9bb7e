"""The layers of a model as the chain of passes that a step goes through."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import nn

from fastalex.distributed.exchange import Exchange
from fastalex.distributed.towers import GatherInput
from fastalex.model.alexnet import HOOKS, AlexNet, layer_names
from fastalex.model.fused import FusedSequential, is_absorbed
from fastalex.model.layers import (
    AdaptiveAvgPool2d,
    Conv2dReLU,
    Dropout,
    Linear,
    LinearReLUDropout,
    LRNMaxPool2d,
    MaxPool2d,
    SpatialResponseNorm,
)
from fastalex.training.cpu_passes import cpu_passes
from fastalex.training.optim import BUFFER, Rates, update_rule
from fastalex.training.passes import (
    Convolution,
    DropRows,
    Flatten,
    FullyConnected,
    Gather,
    Pass,
    Pool,
    Torch,
)
from fastalex.training.updates import FusedUpdate, StoredGradients, momentum_update
from fastalex_kernels.conv2d.forward import pack_weight
from fastalex_kernels.lrn_pool.function import MAX_CHANNELS
from fastalex_kernels.momentum import MomentumUpdate, Updates

_KNOWN = (
    Conv2dReLU, MaxPool2d, LRNMaxPool2d, SpatialResponseNorm, AdaptiveAvgPool2d, Dropout,
    LinearReLUDropout, Linear, nn.Identity, nn.Sequential, FusedSequential, AlexNet,
)  # fmt: skip


def check(model: AlexNet, optimizer: torch.optim.Optimizer) -> None:
    """Raise a ValueError that names what a step can't run, and why."""
    for path, module in model.named_modules():
        what = f"model: {path or 'the model'} is a {type(module).__name__}"
        if type(module) not in _KNOWN and not is_absorbed(module):
            raise ValueError(f"{what}, which is no layer of fastalex's")
        hooks = [hook for kind in HOOKS for hook in getattr(module, kind).values()]
        if any(not isinstance(hook, GatherInput) for hook in hooks):
            raise ValueError(f"{what} with a hook, and the step calls no module")
    update_rule(optimizer)
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        what = f"model: {name}"
        if not parameter.requires_grad:
            raise ValueError(f"{what} is frozen, and the step updates every parameter")
        if parameter.dtype != torch.float32:
            raise ValueError(f"{what} is {parameter.dtype}, expected float32 for every precision")
        if parameter not in owned:
            raise ValueError(f"{what} is not among the optimizer's parameters")
    if len(owned) > len(list(model.parameters())):
        raise ValueError("optimizer: it has parameters that are not the model's")


class Chain:
    """A model's layers in order, and the updates of their parameters.

    Args:
        model, optimizer: that passed ``check``.
        dtype: of the products.
        has_kernels: whether Triton's kernels run where the model is; else every pass is torch's.
        fused_update: whether kernels apply the gradients that they make.
        exchange: with the other tower; None takes the one that ``parallelize`` gave the model.
        aten: names of layers that run on ATen where they have kernels.

    Attributes:
        rates: of the optimizer.
        updates: of the parameters, by name.
        by_layer: of each layer that has parameters, what becomes of their gradients.
        strided: the first layer, where its kernels read its stride's blocks of pixels.
        exchange: the one that is used; None of a whole net.
    """

    def __init__(
        self,
        model: AlexNet,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype,
        has_kernels: bool,
        fused_update: bool,
        exchange: Exchange | None,
        aten: frozenset[str] = frozenset(),
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._dtype, self._triton = dtype, has_kernels
        self._layers = list(_layers(model))
        self._on_aten = {layer for name, layer in self._layers if name in aten}
        gathers = [_gather_hook(layer) for _, layer in self._layers]
        self.exchange = exchange or next((h.exchange for h in gathers if h is not None), None)
        self.rates, rule = Rates(optimizer), update_rule(optimizer)
        self.updates: dict[str, MomentumUpdate] = {}
        self.by_layer: dict[nn.Module, FusedUpdate] = {}
        form = FusedUpdate if fused_update else StoredGradients
        paths = {module: name for name, module in model.named_modules()}
        for _, layer in self._layers:
            if layer is not None and layer._parameters:
                updates = self._updates(layer, rule)
                named = {f"{paths[layer]}.{kind}": x for kind, x in updates.items()}
                self.updates.update(named)
                self.by_layer[layer] = form(layer, Updates(*named.values()))
        self.strided: Conv2dReLU | None = None
        first = self._layers[0][1]
        if isinstance(first, Conv2dReLU) and first.stride[0] > 1 and self._has_kernels(first):
            self.strided = first

    def _updates(self, layer: nn.Module, rule: str) -> dict[str, MomentumUpdate]:
        """The updates of a layer's parameters, in the memory order that its kernels read."""
        kernels_of = layer if self._has_kernels(layer) else None
        if isinstance(kernels_of, Conv2dReLU) and kernels_of.stride[0] == 1:
            weight = kernels_of.weight
            weight.data = pack_weight(weight.data).permute(3, 2, 0, 1)
        updates = {}
        for kind, parameter in layer.named_parameters(recurse=False):
            state, buffer = self._optimizer.state[parameter], torch.zeros_like(parameter)
            if state.get(BUFFER) is not None:
                buffer.copy_(state[BUFFER])
            state[BUFFER], rate = buffer, self.rates.of(parameter)
            updates[kind] = momentum_update(parameter, buffer, rate, rule, self._dtype, kernels_of)
        return updates

    def passes(
        self, image_size: tuple[int, int], fused_activation: bool, early: bool
    ) -> list[tuple[str, Pass]]:
        """The layers by name, each told what is below and above it.

        Args:
            image_size: height and width.
            fused_activation: whether a layer's kernels do the backward pass of the ReLU below it.
            early: whether what needs no answer of the other tower runs before it is waited for.
        """
        average = self._model.avgpool
        nothing_to_do = self._model.map_size(image_size) == average.output_size
        layers = [x for x in self._layers if x[1] is not average or not nothing_to_do]
        on_a_cpu = next(self._model.parameters()).is_cpu and not self._triton
        if on_a_cpu and self.exchange is None and self._dtype == torch.float32:
            return cpu_passes(layers, self.by_layer)
        passes = [(name, self._pass(layer, early)) for name, layer in layers]
        passes[0][1].needs_dx = False
        for (_, below), (_, above) in itertools.pairwise(passes):
            above.masks_dx = below.dy_is_preact = fused_activation and below.relu and above.can_mask
        return passes

    def _pass(self, layer: nn.Module | None, early: bool) -> Pass:
        if layer is None:
            return Flatten()
        hook, update, gather = _gather_hook(layer), self.by_layer.get(layer), None
        if hook is not None and self.exchange is not None:
            gather = Gather(self.exchange, hook.summed, early)
        if not self._has_kernels(layer):
            backend = "aten" if layer in self._on_aten else "auto"
            return Torch(layer, update, gather, self._dtype, backend)
        if isinstance(layer, MaxPool2d):
            return Pool(layer)
        if isinstance(layer, Dropout):
            return DropRows(layer)
        assert update is not None
        if isinstance(layer, Conv2dReLU):
            return Convolution(layer, update, gather)
        assert isinstance(layer, (Linear, LinearReLUDropout))
        return FullyConnected(layer, update, gather)

    def _has_kernels(self, layer: nn.Module) -> bool:
        if not self._triton or layer in self._on_aten:
            return False
        if isinstance(layer, Conv2dReLU):
            first = layer is self._layers[0][1]
            return layer.stride == (1, 1) or (first and layer.groups == 1)
        if isinstance(layer, LRNMaxPool2d):
            widest = max(m.weight.shape[0] for _, m in self._layers if isinstance(m, nn.Conv2d))
            return widest // layer.groups <= MAX_CHANNELS
        linear = isinstance(layer, (Linear, LinearReLUDropout)) and getattr(layer, "groups", 1) == 1
        return linear or isinstance(layer, (MaxPool2d, Dropout))


def _layers(model: AlexNet) -> Iterator[tuple[str, nn.Module | None]]:
    """The layers in order, by name; None stands for the flattening before the first rows."""
    names = {module: name for name, module in layer_names(model).items()}
    last = ""
    for module in model.features.modules():
        if module in names:
            last = names[module]
            yield last, module
    yield last, model.avgpool
    yield last, None
    for module in model.classifier.modules():
        if module in names:
            yield names[module], module


def _gather_hook(layer: nn.Module | None) -> GatherInput | None:
    hooks = () if layer is None else layer._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, GatherInput)), None)
