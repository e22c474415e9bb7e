"""What a layer has to cost, and how evenly a launch's work falls on a GPU's processors.

A floor is the longer of two times: the operations of the layer's formula, without padding and
without the taps of a convolution that fall off the border left out, and the bytes that any way of
computing it has to move, each operand once. A fully connected layer's weight gradient is never
written, because the update can be applied where it is made; the update is a floor of its own.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from fastalex.data.augment import Augment
from fastalex.inspection.gpus import GPU
from fastalex.inspection.record import Layer
from fastalex.model.layers import Conv2dReLU, LRNMaxPool2d, MaxPool2d

UPDATE_BYTES = 18  # of a parameter: weight, momentum read and written in float32, a 2-byte gradient
LINK_BANDWIDTH = 0.37  # TB/s in one direction between two GPUs, NVLink 4
_BLOCKS = 32  # resident programs of a processor
_RESERVED_SHARED = 1 << 10  # of a program, by the system
_REGISTERS = 1 << 16  # of a processor
OVERHEAD_CYCLES = 1500  # of a program in which its processor has nothing from it


class Floor(NamedTuple):
    """The least that a pass through a layer takes."""

    flops: float  # operations of its formula
    size: float  # bytes
    # Operations on real data for the way it is computed: without the taps that fall off the border,
    # and for a convolution with a stride, with its window filled up to a multiple of the stride.
    useful: float = 0.0


def tap_share(layer: Layer) -> float:
    """The taps of a convolution that touch the image, over all of them; 1 for other layers."""
    module = layer.module
    if not isinstance(module, Conv2dReLU) or module.stride[0] > 1:
        return 1.0
    share = 1.0
    padding = (int(pad) for pad in module.padding)
    for size, outputs, kernel, pad in zip(
        layer.input[2:], layer.output[2:], module.kernel_size, padding, strict=True
    ):
        inside = sum(
            min(kernel, size + int(pad) - p) - max(0, int(pad) - p) for p in range(outputs)
        )
        share *= inside / (outputs * kernel)
    return share


def floors(
    layers: Mapping[str, Layer], itemsize: int, train: bool, one_pass: Collection[str] = ()
) -> dict[tuple[str, str], Floor]:
    """The floor of each pass, by layer and one of ``forward``, ``input``, ``weight``, ``backward``.

    Args:
        layers: in order.
        itemsize: bytes of an activation.
        train: whether there are gradients.
        one_pass: the fully connected layers of which one launch makes both gradients.
    """
    result: dict[tuple[str, str], Floor] = {}
    ordered = list(layers.values())
    for layer, following in zip(ordered, [*ordered[1:], None], strict=True):
        if isinstance(layer.module, Augment):
            # A byte for each value of a crop, and what the first layer reads of them.
            size = math.prod(layer.input) + itemsize * math.prod(layer.output)
            passes = {"forward": Floor(0.0, size)}
        elif isinstance(layer.module, MaxPool2d):
            passes = _pooling(layer, itemsize, train)
        elif layer.weight is None:
            continue
        elif isinstance(layer.module, Conv2dReLU):
            # Before another convolution the ReLU's mask is read from the output itself; a pooling
            # layer's gradient can be masked where it is made.
            masked = following is not None and isinstance(following.module, Conv2dReLU)
            passes = _convolution(layer, itemsize, masked)
        else:
            passes = _linear(layer, itemsize, layer.name in one_pass)
        if not layer.needs_input_grad:
            passes.pop("input", None)
        for name, floor in passes.items():
            if train or name == "forward":
                result[layer.name, name] = floor
    return result


def _convolution(layer: Layer, itemsize: int, masked: bool) -> dict[str, Floor]:
    assert layer.weight is not None
    assert isinstance(layer.module, Conv2dReLU)
    k, _, r, s = layer.weight
    stride = layer.module.stride[0]
    x, y, w = math.prod(layer.input), math.prod(layer.output), math.prod(layer.weight)
    flops = 2.0 * (y // k) * w
    window = math.ceil(r / stride) * math.ceil(s / stride) * stride**2
    useful = flops * window / (r * s) * tap_share(layer)
    forward = itemsize * (x + y + w)
    return {
        "forward": Floor(flops, forward, useful),
        "input": Floor(flops, forward + itemsize * y * masked, useful),
        "weight": Floor(flops, itemsize * (x + y) + 4 * w, useful),
    }


def _linear(layer: Layer, itemsize: int, one_pass: bool) -> dict[str, Floor]:
    assert layer.weight is not None
    x, y, w = math.prod(layer.input), math.prod(layer.output), math.prod(layer.weight)
    flops = 2.0 * layer.input[0] * w
    both = Floor(flops, itemsize * (x + y + w), flops)
    if one_pass:  # the update reads the weight in any case
        backward = Floor(2 * flops, itemsize * (2 * x + y), 2 * flops)
        return {"forward": both, "backward": backward}
    return {"forward": both, "input": both, "weight": Floor(flops, itemsize * (x + y), flops)}


def _pooling(layer: Layer, itemsize: int, train: bool) -> dict[str, Floor]:
    x, y = itemsize * math.prod(layer.input), itemsize * math.prod(layer.output)
    if train and not isinstance(layer.module, LRNMaxPool2d):
        # The position of a maximum, a byte, costs less than to read the input again.
        at = y // itemsize
        return {"forward": Floor(0.0, x + y + at), "backward": Floor(0.0, y + at + x)}
    return {"forward": Floor(0.0, x + y), "backward": Floor(0.0, y + 2 * x)}


def resident(gpu: GPU, registers: int, shared: int, warps: int) -> int:
    """Programs that a processor of ``gpu`` holds at once, of so many registers of a thread, bytes
    of shared memory and warps."""
    threads = 32 * warps  # whose registers are given out by eights
    by_registers = _REGISTERS // (-(-max(registers, 1) // 8) * 8 * threads)
    by_shared = gpu.shared // (shared + _RESERVED_SHARED)
    return max(1, min(by_registers, by_shared, gpu.threads // threads, _BLOCKS))


def taken_slots(gpu: GPU, programs: int, slots: int) -> int:
    """Of the ``slots`` of a processor, those that so many programs take."""
    return min(slots, -(-programs // gpu.processors))


def schedule(
    gpu: GPU, cycles: Sequence[float], slots: int, overhead: float = OVERHEAD_CYCLES
) -> float:
    """The cycle in which the last program ends.

    Programs start in order, each where a place is free first. The places of a processor share it
    evenly, and a program keeps its place for some cycles in which it does not use it: its first
    loads and its last stores. Where places outnumber programs, every processor gets as many.

    Args:
        gpu: one of ``fastalex.inspection.gpus.GPUS``.
        cycles: of each program, if it had a processor to itself.
        slots: programs that a processor holds at once.
        overhead: cycles in which a program does not use its processor.
    """
    slots = taken_slots(gpu, len(cycles), slots)
    free = [0.0] * (gpu.processors * slots)
    last = 0.0
    for work in cycles:
        end = free[0] + work * slots + overhead
        heapq.heapreplace(free, end)
        last = max(last, end)
    return last
