"""AlexNet over processes: the paper's two towers, and replicas that share a batch.

The model is written for one device; the split is applied to it from outside. A mesh has two axes:
along ``tower`` lie the two halves of one net, along ``data`` copies of it. ``parallelize`` cuts
every layer to this process's tower and puts in the exchanges of P§3.5 for the four layers that
read both towers: conv3, fc6, fc7 and fc8.

An exchange sends this tower's maps and gets the other's, and sets tower 0's first, so that what
follows sees what one process would. Backward, each process holds a gradient for both halves; it
sends the other's half away, and adds the one it receives to its own. The last layer (the authors
had it on the first process alone) is cut by its inputs: each process multiplies the half that it
made, and they exchange and add what comes out. So both know the loss, and backward nothing is
sent. Its bias is on both. One process, two towers and any number of replicas agree to rounding,
dropout included, because masks and weights are functions of their place in the whole net.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastalex.common.nvtx_ranges import nvtx_range
from fastalex.common.timing import Stopwatch
from fastalex.distributed.exchange import (
    TOWERS,
    AddTowers,
    Exchange,
    GatherTowers,
    checked_exchange,
)
from fastalex.model.alexnet import AlexNet
from fastalex.model.layers import Conv2dReLU, CounterDropout, LinearReLUDropout, LRNMaxPool2d


def init_mesh(device_type: str, data: int, tower: int) -> DeviceMesh:
    """A mesh of ``data`` replicas of 1 or 2 towers; neighbouring ranks are one net's towers."""
    return init_device_mesh(device_type, (data, tower), mesh_dim_names=("data", "tower"))


def parallelize(model: AlexNet, mesh: DeviceMesh, stopwatch: Stopwatch | None = None) -> AlexNet:
    """Turn ``model`` into this process's part of it, in place, and return it.

    Args:
        model: a whole AlexNet on this process's device.
        mesh: from ``init_mesh``; its ``tower`` axis is 1 or 2 long.
        stopwatch: counts the time of exchange between towers.

    Raises:
        ValueError: where the variant has no two independent towers.
        RuntimeError: where the towers cannot exchange data.
    """
    _broadcast(model, mesh, "data")
    if mesh["tower"].size() == 1:
        return model
    if mesh["tower"].size() != model.variant.towers:
        raise ValueError(
            f"mesh: variant {model.variant.name!r} has {model.variant.towers} tower(s), "
            f"got a tower axis of {mesh['tower'].size()}"
        )
    exchange = checked_exchange(mesh, stopwatch)
    _broadcast(model, mesh, "tower")
    cut_to_tower(model, exchange)
    return model


def cut_to_tower(model: AlexNet, exchange: Exchange) -> None:
    """Keep one tower of a whole ``model``, in place, its halves fetched through ``exchange``."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        reads_both = layer is not model.features[0] and getattr(layer, "groups", 1) == 1
        if layer is model.classifier[-1]:
            layer.register_forward_hook(AddOutputs(exchange))
            _cut_inputs(layer, exchange.rank)
            continue
        if reads_both:
            layer.register_forward_pre_hook(GatherInput(exchange))
        _cut(layer, exchange.rank)
    for norm in model.features.modules():
        if isinstance(norm, LRNMaxPool2d):
            norm.groups = 1


@dataclass(frozen=True)
class GatherInput:
    """Gives a layer both towers' halves of its input, as a hook before its forward pass."""

    exchange: Exchange

    def __call__(self, layer: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (GatherTowers.apply(inputs[0], self.exchange),)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class AddOutputs:
    """Makes of the outputs of a layer that is cut by its inputs their sum, as a hook after it."""

    exchange: Exchange

    def __call__(self, layer: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return AddTowers.apply(output, layer.bias, self.exchange)  # type: ignore[no-any-return, no-untyped-call]


def _cut(layer: nn.Conv2d | nn.Linear, tower: int) -> None:
    """Keep this tower's half of a layer's outputs."""
    for name in ("weight", "bias"):
        _replace(layer, name, 0, tower)
    if isinstance(layer, Conv2dReLU):
        layer.out_channels //= TOWERS
        if layer.groups > 1:
            layer.groups //= TOWERS
            layer.in_channels //= TOWERS
    elif isinstance(layer, LinearReLUDropout):
        layer.out_features //= TOWERS
        if layer.groups > 1:
            layer.groups //= TOWERS
            layer.in_features //= TOWERS
        layer.set_mask(feature_offset=tower * layer.out_features)


def _cut_inputs(layer: Any, tower: int) -> None:
    """Keep this tower's half of a layer's inputs."""
    _replace(layer, "weight", 1, tower)
    layer.in_features //= TOWERS


def _replace(layer: nn.Module, name: str, axis: int, tower: int) -> None:
    """Keep this tower's half of a parameter along ``axis``."""
    half = getattr(layer, name).detach().chunk(TOWERS, axis)[tower].clone()
    setattr(layer, name, nn.Parameter(half))


def _broadcast(model: nn.Module, mesh: DeviceMesh, axis: str) -> None:
    """Give every process along ``axis`` the first one's parameters."""
    if mesh[axis].size() == 1:
        return
    group = mesh.get_group(axis)
    for parameter in model.parameters():
        sent = parameter.detach().contiguous()
        dist.broadcast(sent, dist.get_global_rank(group, 0), group)
        parameter.data.copy_(sent)


def set_row_offset(model: nn.Module, row: int) -> None:
    """Tell the dropout layers which row of the whole batch this process's first one is."""
    for layer in model.modules():
        if isinstance(layer, CounterDropout):
            layer.set_mask(row_offset=row)


def reduce_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make every replica's gradients those of the whole batch, of which all have as many rows."""
    replicas = mesh["data"].size()
    if replicas == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    flat.mul_(1.0 / replicas)
    with nvtx_range("all-reduce gradients"):
        dist.all_reduce(flat, group=mesh.get_group("data"))
    totals = torch.split(flat, [g.numel() for g in gradients])
    for gradient, total in zip(gradients, totals, strict=True):
        gradient.copy_(total.view(gradient.shape))


def gradient_norm(norms: dict[str, torch.Tensor], model: AlexNet, mesh: DeviceMesh) -> torch.Tensor:
    """The Euclidean norm of the whole net's gradient, a scalar; every process takes part."""
    axes = _axes(model)
    parts = [g for name, g in norms.items() if axes[name] is not None]
    shared = [g for name, g in norms.items() if axes[name] is None]
    total = torch.nn.utils.get_total_norm(parts).square()
    if mesh["tower"].size() > 1:
        dist.all_reduce(total, group=mesh.get_group("tower"))
    return (total + torch.nn.utils.get_total_norm(shared).square()).sqrt()


def full_tensors(
    model: AlexNet, mesh: DeviceMesh, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Whole tensors of parts named like the parameters: weights, gradients or momentum buffers.

    A collective: every process along ``tower`` calls it, and all get the whole.
    """
    if mesh["tower"].size() == 1:
        return {name: t.detach() for name, t in tensors.items()}
    group, axes = mesh.get_group("tower"), _axes(model)
    result = {}
    for name, tensor in tensors.items():
        part = tensor.detach().contiguous()
        axis = axes[name]
        if axis is not None:
            parts = [torch.empty_like(part) for _ in range(TOWERS)]
            dist.all_gather(parts, part, group=group)
            part = torch.cat(parts, axis)
        result[name] = part
    return result


def local_tensors(
    model: AlexNet, mesh: DeviceMesh, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """This process's parts of whole tensors named like the parameters: undoes ``full_tensors``."""
    if mesh["tower"].size() == 1:
        return dict(tensors)
    tower, axes = mesh.get_local_rank("tower"), _axes(model)
    result = {}
    for name, t in tensors.items():
        axis = axes[name]
        result[name] = t if axis is None else t.chunk(TOWERS, axis)[tower].clone()
    return result


def _axes(model: AlexNet) -> dict[str, int | None]:
    """The axis along which each parameter is cut; None of what both towers have."""
    last = f"classifier.{len(model.classifier) - 1}"
    axes: dict[str, int | None] = dict.fromkeys((name for name, _ in model.named_parameters()), 0)
    return {**axes, f"{last}.weight": 1, f"{last}.bias": None}


def first_elements(model: AlexNet) -> dict[torch.Tensor, tuple[int, int]]:
    """Row and column, in the whole net's weight, of the first element of each weight of rows."""
    hooks = model.classifier[-1]._forward_hooks.values()
    tower = next((hook.exchange.rank for hook in hooks if isinstance(hook, AddOutputs)), 0)
    axes = _axes(model)
    return {
        w: (0, tower * w.shape[1]) if axes[name] == 1 else (tower * len(w), 0)
        for name, w in model.named_parameters()
        if w.dim() == 2
    }
