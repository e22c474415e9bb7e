"""The net as an ONNX graph, a node for each layer: LRN is ONNX's own, and nothing is traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from fastalex.data import Normalization, decode_size
from fastalex.formats.onnx import NEEDED
from fastalex.model.alexnet import AlexNet
from fastalex.model.forms import TowerLinear, TowerLocalResponseNorm
from fastalex.model.layers import SpatialResponseNorm

_FLOAT = 1  # ONNX's number for float32
_OPSET = 18  # the first whose Split is told into how many parts
_IR_VERSION = 8  # which runtimes from 2022 on read


def build(
    net: AlexNet, image_size: int, scale: Normalization | None, metadata: Mapping[str, str]
) -> Any:
    """The graph of an unfused net in evaluation mode, an onnx.ModelProto with ``metadata_props``.

    Its input ``images`` is float32 [N, 3, S, S], normalised, or with ``scale`` uint8 [N, height,
    width, 3] of any height and width; its output is ``logits`` [N, classes].

    Raises:
        ValueError: for a layer that is no part of AlexNet, and where onnx is not installed.
    """
    try:
        import onnx
        from onnx import TensorProto, helper
    except ImportError as error:
        raise ValueError(NEEDED) from error
    graph = _Graph()
    kind: int = TensorProto.FLOAT
    shape: list[int | str] = ["N", 3, image_size, image_size]
    if scale is not None:
        kind, shape = TensorProto.UINT8, ["N", "height", "width", 3]
        graph.preprocess(scale, image_size)
    side = image_size
    for name, layer in net.named_modules():
        if name == "classifier":
            graph.add("Flatten", axis=1)
        if not list(layer.children()):
            side = graph.layer(name, layer, side)
    graph.nodes[-1].output[0] = "logits"
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            f"AlexNet, {net.variant.name}",
            [helper.make_tensor_value_info("images", kind, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", net.num_classes])],
            graph.tensors,
        ),
        producer_name="fastalex",
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
    )
    helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    return model


class _Graph:
    """Nodes in a row, each reading the last one's output."""

    def __init__(self) -> None:
        from onnx import helper, numpy_helper

        self._node, self._tensor = helper.make_node, numpy_helper.from_array
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self.last = "images"

    def add(self, kind: str, *inputs: str, source: str = "", **attributes: Any) -> str:
        """Append a node that reads ``source`` (the last output) and then ``inputs``."""
        output = f"{kind.lower()}_{len(self.nodes)}"
        reads = [source or self.last, *inputs]
        self.nodes.append(self._node(kind, reads, [output], **attributes))
        self.last = output
        return output

    def store(self, name: str, values: Any) -> str:
        """Keep an array or a number under ``name``."""
        array = values.detach().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
        self.tensors.append(self._tensor(np.ascontiguousarray(array), name))
        return name

    def halves(self, kind: str, inputs: Sequence[Sequence[str]], **attributes: Any) -> None:
        """Append a node for each tower's half of the last output, and put the halves together."""
        source, number = self.last, len(self.nodes)
        halves = [f"half_{number}_{i}" for i in range(2)]
        self.nodes.append(self._node("Split", [source], halves, axis=1, num_outputs=2))
        pairs = zip(halves, inputs, strict=True)
        first, second = (self.add(kind, *own, source=half, **attributes) for half, own in pairs)
        self.add("Concat", second, source=first, axis=1)

    def layer(self, name: str, layer: nn.Module, side: int) -> int:
        """Append a layer; the side of the maps behind it."""
        if isinstance(layer, (nn.Identity, nn.Dropout)):
            return side
        if isinstance(layer, nn.ReLU):
            self.add("Relu")
        elif isinstance(layer, nn.Conv2d):
            return self._convolution(name, layer, side)
        elif isinstance(layer, nn.MaxPool2d):
            kernel, stride = int(layer.kernel_size), int(layer.stride)  # type: ignore[arg-type]
            ceil = int(layer.ceil_mode)
            sides: dict[str, Any] = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2}
            self.add("MaxPool", ceil_mode=ceil, **sides)
            return (side - kernel + (stride - 1) * ceil) // stride + 1
        elif isinstance(layer, nn.LocalResponseNorm):
            norm: dict[str, Any] = {"size": layer.size, "alpha": layer.alpha, "beta": layer.beta}
            if isinstance(layer, TowerLocalResponseNorm):
                self.halves("LRN", [(), ()], bias=layer.k, **norm)
            else:
                self.add("LRN", bias=layer.k, **norm)
        elif isinstance(layer, SpatialResponseNorm):
            self._spatial_norm(name, layer)
        elif isinstance(layer, nn.AdaptiveAvgPool2d):
            size: Any = layer.output_size
            self._average(name, side, size[0])
        elif isinstance(layer, nn.Linear):
            self._linear(name, layer)
        else:
            raise ValueError(f"{name}: {type(layer).__name__} is no layer of AlexNet")
        return side

    def _parameters(self, name: str, layer: nn.Conv2d | nn.Linear) -> list[str]:
        return [self.store(f"{name}.{part}", getattr(layer, part)) for part in ("weight", "bias")]

    def _convolution(self, name: str, layer: nn.Conv2d, side: int) -> int:
        kernel, stride, pad = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        span = side + 2 * pad - kernel
        missing = -span % stride if getattr(layer, "ceil_mode", False) else 0
        sides: dict[str, Any] = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2}
        pads = [pad, pad, pad + missing, pad + missing]
        self.add("Conv", *self._parameters(name, layer), group=layer.groups, pads=pads, **sides)
        return (span + missing) // stride + 1

    def _spatial_norm(self, name: str, layer: SpatialResponseNorm) -> None:
        source, before, after = self.last, layer.size // 2, (layer.size - 1) // 2
        self.add("Mul", source)
        pads, sides = [before, before, after, after], [layer.size] * 2
        self.add("AveragePool", kernel_shape=sides, pads=pads, strides=[1, 1], count_include_pad=1)
        for kind, value in (("Mul", layer.alpha), ("Add", layer.k), ("Pow", -layer.beta)):
            self.add(kind, self.store(f"{name}.{kind}", np.float32(value)))
        self.add("Mul", source)

    def _average(self, name: str, side: int, parts: int) -> None:
        """Adaptive average pooling, as two products."""
        if side == parts:
            return
        shares = F.adaptive_avg_pool1d(torch.eye(side)[None], parts)[0]  # [side, parts]
        self.add("MatMul", self.store(f"{name}.columns", shares))
        rows = self.store(f"{name}.rows", shares.T)
        self.add("MatMul", self.last, source=rows)

    def _linear(self, name: str, layer: nn.Linear) -> None:
        if not isinstance(layer, TowerLinear):
            self.add("Gemm", *self._parameters(name, layer), transB=1)
            return
        parts = zip(layer.weight.chunk(2), layer.bias.chunk(2), strict=True)
        stored = [
            (self.store(f"{name}.weight.{i}", weight), self.store(f"{name}.bias.{i}", bias))
            for i, (weight, bias) in enumerate(parts)
        ]
        self.halves("Gemm", stored, transB=1)

    def preprocess(self, scale: Normalization, image_size: int) -> None:
        """Bytes [N, height, width, 3] to normalised images, as fastalex's own commands do it.

        The centre square is resized by products with triangles, which are the same everywhere, as
        Resize is not. They are rounded after each axis, as Pillow does.
        """
        side = decode_size(image_size)
        sides = self.add("Shape", source="images", start=1, end=3)
        self.add("ReduceMin", source=sides, keepdims=1)
        short = self.add("Cast", to=_FLOAT)
        step = self.add("Div", self.store("side", np.array([side], np.float32)), source=short)
        for name, value in {"half": 0.5, "one": 1.0}.items():
            self.store(name, np.array([value], np.float32))
        for name, number in {"first": 0, "next": 1}.items():
            self.store(name, np.array(number))
        self.store("pixels", np.array([1]))
        self.store("places", np.arange(side, dtype=np.float32)[:, None] + 0.5)
        down, across = (self._triangles(axis, short, step) for axis in (1, 2))
        columns = self.add("Transpose", source=across, perm=[1, 0])
        self.add("Cast", source="images", to=_FLOAT)
        pixels = self.add("Transpose", perm=[0, 3, 1, 2])
        self.add("MatMul", columns, source=pixels)
        self._round()
        self.add("MatMul", self.last, source=down)
        self._round()
        start = (side - image_size) // 2
        bounds = {"start": [start] * 2, "end": [start + image_size] * 2, "last axes": [2, 3]}
        self.add("Slice", *(self.store(name, np.array(v)) for name, v in bounds.items()))
        mean, std = mean_and_std(scale, image_size)
        self.add("Sub", self.store("mean", mean))
        self.add("Div", self.store("std", std))

    def _triangles(self, axis: int, short: str, step: str) -> str:
        """[side, length]: what the pixels along an axis count in each of those made of them.

        The pixel at ``place`` is made around ``place * step``, from where the centre begins.
        """
        length = self.add("Shape", source="images", start=axis, end=axis + 1)
        self.add("Cast", to=_FLOAT)
        self.add("Sub", short)
        spare = self.add("Mul", "half")
        self.add("Mul", step, source="places")
        centres = self.add("Add", spare)
        limit = self.add("Squeeze", source=length)
        self.add("Range", limit, "next", source="first")
        self.add("Cast", to=_FLOAT)
        self.add("Add", "half")
        distance = self.add("Sub", centres)
        width = self.add("Max", "one", source=step)
        self.add("Div", width, source=distance)
        distance = self.add("Abs")
        self.add("Sub", distance, source="one")
        triangles = self.add("Relu")
        total = self.add("ReduceSum", "pixels", source=triangles, keepdims=1)
        return self.add("Div", total, source=triangles)

    def _round(self) -> None:
        """To whole numbers, halves up."""
        self.add("Add", "half")
        self.add("Floor")


def mean_and_std(
    scale: Normalization, image_size: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """float32 [3, 1, 1] each, and of a mean image its centre [3, image_size, image_size]."""
    mean, std = (np.array(x, np.float32)[:, None, None] for x in (scale.mean, scale.std))
    if scale.mean_image is not None:
        start = (decode_size(image_size) - image_size) // 2
        centre = slice(start, start + image_size)
        mean = np.ascontiguousarray(scale.mean_image.pixels[centre, centre].transpose(2, 0, 1))
    return mean, std
