"""The layers of a model as the chain of passes that a step goes through."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fastalex_kernels as kernels
from fastalex.data.augment import Augment
from fastalex.distributed.exchange import Exchange
from fastalex.distributed.towers import AddOutputs, GatherInput
from fastalex.model.alexnet import HOOKS, AlexNet, layer_names
from fastalex.model.forms import FusedSequential, is_absorbed
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
from fastalex.training.inputs import Inputs, augmented, by_torch
from fastalex.training.optim import BUFFER, Rates, update_rule
from fastalex.training.passes import (
    Convolution,
    DropRows,
    Flatten,
    FullyConnected,
    Gather,
    GatherOutputs,
    Pass,
    Pool,
    Torch,
)
from fastalex.training.updates import FusedUpdate, StoredGradients, momentum_update
from fastalex_kernels.common.backend import chosen, too_old, use_triton
from fastalex_kernels.common.launch import call
from fastalex_kernels.conv2d.forward import pack_weight
from fastalex_kernels.cross_entropy import cross_entropy_forward
from fastalex_kernels.lrn_pool.function import MAX_CHANNELS
from fastalex_kernels.momentum import MomentumUpdate, Updates

_KNOWN = (
    Conv2dReLU, MaxPool2d, LRNMaxPool2d, SpatialResponseNorm, AdaptiveAvgPool2d, Dropout,
    LinearReLUDropout, Linear, nn.Identity, nn.Sequential, FusedSequential, AlexNet,
)  # fmt: skip


def check(model: AlexNet, optimizer: torch.optim.Optimizer) -> None:
    """Raise a ValueError that names what a step can't run, and why."""
    device = next(model.parameters()).device
    if device.type == "cuda" and chosen() == "auto" and (why := too_old(device.index)):
        raise ValueError(why)
    for path, module in model.named_modules():
        what = f"model: {path or 'the model'} is a {type(module).__name__}"
        if type(module) not in _KNOWN and not is_absorbed(module):
            raise ValueError(f"{what}, which is no layer of fastalex's")
        hooks = [hook for kind in HOOKS for hook in getattr(module, kind).values()]
        if any(not isinstance(hook, (GatherInput, AddOutputs)) for hook in hooks):
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


@dataclass(frozen=True)
class Tricks:
    """What makes the step fast beyond its kernels; each can be left out, to measure its worth.

    Attributes:
        fused_update: gradients are applied by the kernels that make them.
        fused_activation: a ReLU's backward pass is done by the kernel that makes its gradient.
        early: what needs no answer of the other tower runs while its half is on its way.
        dependent_launch: on sm_90 and newer a kernel starts while the one before it still ends.
        graph: on a GPU the recorded launches are captured as a CUDA graph.
    """

    fused_update: bool = True
    fused_activation: bool = True
    early: bool = True
    dependent_launch: bool = True
    graph: bool = False


@dataclass
class Chain:
    """A model's layers in order, the updates of their parameters, and the two ends.

    Of what ``TrainStep`` is given; ``aten`` are names of layers, and ends, that run on ATen where
    they have kernels.

    Attributes:
        has_kernels: whether Triton's kernels run where the model is; else every pass is torch's.
        rates: of the optimizer.
        updates: of the parameters, by name.
        by_layer: of each layer that has parameters, what becomes of their gradients.
        one: the gradient of the loss.
    """

    model: AlexNet
    optimizer: torch.optim.Optimizer
    dtype: torch.dtype
    tricks: Tricks
    exchange: Exchange | None
    augment: Augment | None
    aten: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        first = next(self.model.parameters())
        self.has_kernels, self.one = use_triton(first), torch.ones((), device=first.device)
        self._layers = list(_layers(self.model))
        self._on_aten = {layer for name, layer in self._layers if name in self.aten}
        hooks = [hook for _, layer in self._layers for hook in _hooks(layer)]
        self.exchange = self.exchange or next((hook.exchange for hook in hooks), None)
        self.rates = Rates(self.optimizer)
        self.updates: dict[str, MomentumUpdate] = {}
        self.by_layer: dict[nn.Module, FusedUpdate] = {}
        form = FusedUpdate if self.tricks.fused_update else StoredGradients
        paths = {module: name for name, module in self.model.named_modules()}
        for _, layer in self._layers:
            if layer is not None and layer._parameters:
                updates = self._updates(layer)
                self.by_layer[layer] = form(layer, Updates(*updates.values()))
                self.updates.update({f"{paths[layer]}.{kind}": x for kind, x in updates.items()})
        conv1: Any = self._layers[0][1]
        blocks = isinstance(conv1, Conv2dReLU) and conv1.stride[0] > 1 and self._runs(conv1)
        self._strided = conv1 if blocks else None  # it reads blocks of pixels as channels

    def _updates(self, layer: nn.Module) -> dict[str, MomentumUpdate]:
        """The updates of a layer's parameters, in the memory order that its kernels read."""
        runs, rule = self._runs(layer), update_rule(self.optimizer)
        if runs and isinstance(layer, Conv2dReLU) and layer.stride[0] == 1:
            layer.weight.data = pack_weight(layer.weight.data).permute(3, 2, 0, 1)
        updates = {}
        for kind, w in layer.named_parameters(recurse=False):
            state, rng = self.optimizer.state[w], self.rates.rng(w)
            dtype = torch.float32 if rng is None else torch.bfloat16
            before, buffer = state.get(BUFFER), torch.zeros_like(w, dtype=dtype).detach()
            if before is not None and before.dtype == dtype and before.stride() == w.stride():
                buffer = before
            elif before is not None:
                buffer.copy_(before)
            state[BUFFER], rate = buffer, self.rates.of(w)
            kernels_of = layer if runs else None
            updates[kind] = momentum_update(w, buffer, rate, rule, self.dtype, kernels_of, rng)
        return updates

    def first_input(self, images: Inputs, by_kernel: bool = True) -> torch.Tensor:
        """What the first layer reads: HWNC maps, or blocks of pixels as their channels."""
        augment = self.augment if len(images) > 1 else None
        if augment is not None and by_kernel and self.has_kernels and "augment" not in self.aten:
            return augmented(images, augment, self._strided, self.dtype)
        return by_torch(images, augment, self._strided, self.dtype)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean loss, in parts on kernels, and the gradient of the logits."""
        if self.has_kernels and "loss" not in self.aten:
            loss, gradient = cross_entropy_forward(logits, labels, self.one)
            assert gradient is not None
            return loss, gradient
        loss, gradient = self.one.new_empty(()), torch.empty_like(logits)
        call(_torch_loss, logits, labels, loss, gradient)
        return loss, gradient

    def passes(self, images: Inputs) -> list[tuple[str, Pass]]:
        """The layers by name, for such images, each told what is below and above it."""
        average, first = self.model.avgpool, images[0]
        assert first is not None
        size = (first.shape[2], first.shape[3])
        if len(images) > 1 and self.augment is not None:
            size = (self.augment.size, self.augment.size)
        nothing_to_do = self.model.map_size(size) == average.output_size
        layers = [x for x in self._layers if x[1] is not average or not nothing_to_do]
        on_a_cpu = first.is_cpu and not self.has_kernels
        if on_a_cpu and self.exchange is None and self.dtype == torch.float32:
            return cpu_passes(layers, self.by_layer)
        passes = [(name, self._pass(layer)) for name, layer in layers]
        passes[0][1].needs_dx = False
        for (_, below), (_, above) in itertools.pairwise(passes):
            masks = self.tricks.fused_activation and below.relu and above.can_mask
            above.masks_dx = below.dy_is_preact = masks
            below.dy_is_sum = above.gather is not None
        return passes

    def _pass(self, layer: nn.Module | None) -> Pass:
        if layer is None:
            return Flatten()
        update, gather, add = self.by_layer.get(layer), None, None
        for hook in _hooks(layer):
            assert self.exchange is not None
            if isinstance(hook, GatherInput):
                gather = Gather(self.exchange, self.tricks.early)
            else:
                add = GatherOutputs(self.exchange)
        if not self._runs(layer):
            backend = "aten" if layer in self._on_aten else "auto"
            return Torch(layer, update, gather, add, self.dtype, backend)
        if isinstance(layer, MaxPool2d):
            return Pool(layer)
        if isinstance(layer, Dropout):
            return DropRows(layer)
        assert update is not None
        if isinstance(layer, Conv2dReLU):
            return Convolution(layer, update, gather)
        assert isinstance(layer, (Linear, LinearReLUDropout))
        return FullyConnected(layer, update, gather, add)

    def _runs(self, layer: nn.Module) -> bool:
        """Whether a layer runs on kernels."""
        if not self.has_kernels or layer in self._on_aten:
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


def _torch_loss(
    logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor, gradient: torch.Tensor
) -> None:
    """The loss by torch's operators."""
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad(), kernels.backend("aten"):
        mean = kernels.cross_entropy(leaf, labels)
    loss.copy_(mean.detach())
    gradient.copy_(torch.autograd.grad(mean, leaf)[0])


def _hooks(layer: nn.Module | None) -> list[Any]:
    """Those of a tower's layer; ``check`` lets no others pass."""
    if layer is None:
        return []
    return [*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()]
