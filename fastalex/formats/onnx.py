"""ONNX files: the weights of the convolutions and products, and what the LRN between them is.

Source: onnx/onnx.proto of onnx/onnx.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy.typing as npt

from fastalex.formats.layers import Array, ForeignNet
from fastalex.formats.protobuf import Message

_IR_VERSION, _PRODUCER, _GRAPH, _METADATA = 1, 2, 7, 14  # of ModelProto
_NODES, _INITIALIZERS, _INPUTS = 1, 5, 11  # of GraphProto
_TYPES = {1: ("<f4", 4), 11: ("<f8", 10), 10: ("<f2", 0)}  # of TensorProto: dtype, field
_RAW, _LOCATION = 9, 14
# k and alpha of the local response norms.
_NORMS = {(1.0, 1e-4): "caffe", (2.0, 5e-4): "paper", (2.0, 1e-4): "source2012"}


def is_onnx(file: Message) -> bool:
    return _GRAPH in file and _IR_VERSION in file


class _Node(NamedTuple):
    kind: str
    inputs: list[str]
    attributes: dict[str, Message]


def read_onnx(file: Message) -> ForeignNet:
    """The layers of an ONNX file, as its Conv and Gemm nodes hold them.

    Raises:
        ValueError: where the file is damaged, keeps its weights elsewhere or is quantised.
    """
    graph = file.message(_GRAPH)
    tensors = {tensor.string(8): tensor for tensor in graph.messages(_INITIALIZERS)}
    nodes = [_node(node) for node in graph.messages(_NODES)]
    layers = []
    for node in nodes:
        if node.kind not in ("Conv", "Gemm"):
            continue
        weight, bias = (_tensor(tensors, node, index) for index in (1, 2))
        if node.kind == "Gemm" and not _integer(node, "transB"):
            weight = weight.T
        layers.append((weight, bias))
    metadata = {pair.string(1): pair.string(2) for pair in file.messages(_METADATA)}
    producer = file.string(_PRODUCER)[:40]
    return ForeignNet(
        f"ONNX of {producer!r}",
        layers,
        _variant(nodes),
        bgr="caffe" in producer.lower(),
        image_size=_image_size(graph, set(tensors)),
    ).told(metadata)


def _node(node: Message) -> _Node:
    attributes = {attribute.string(1): attribute for attribute in node.messages(5)}
    return _Node(node.string(4), node.strings(1), attributes)


def _integer(node: _Node, name: str) -> int:
    return node.attributes[name].number(3) if name in node.attributes else 0


def _tensor(tensors: dict[str, Message], node: _Node, index: int) -> Array:
    name = node.inputs[index] if index < len(node.inputs) else ""
    if name not in tensors:
        raise ValueError(f"a {node.kind} whose operand {index} is no stored tensor, or quantised")
    tensor = tensors[name]
    if tensor.number(_LOCATION):
        raise ValueError("its weights are in another file; save it as one (external_data=False)")
    if tensor.number(2) not in _TYPES:
        raise ValueError(f"{name[:40]!r}: type {tensor.number(2)} is not float16, 32 or 64")
    dtype, field = _TYPES[tensor.number(2)]
    dims = tensor.numbers(1)
    values: npt.NDArray[Any] = tensor.array(_RAW if _RAW in tensor else field, dtype)
    if math.prod(dims) != len(values):
        raise ValueError(f"{name[:40]!r}: of shape {dims[:8]}, but has {len(values)} numbers")
    return values.reshape(dims)


def _variant(nodes: list[_Node]) -> str | None:
    """What the norms say; None where there are none."""
    places = [node for node in nodes if node.kind in ("LRN", "MaxPool")]
    norms = [node for node in places if node.kind == "LRN"]
    if not norms:
        return None
    if places[0].kind == "MaxPool":
        return "caffenet"
    defaults = {"bias": 1.0, "alpha": 1e-4}
    k, alpha = (
        norms[0].attributes[name].float(2, value) if name in norms[0].attributes else value
        for name, value in defaults.items()
    )
    for (its_k, its_alpha), variant in _NORMS.items():
        if math.isclose(k, its_k, rel_tol=1e-5) and math.isclose(alpha, its_alpha, rel_tol=1e-5):
            return variant
    raise ValueError(f"its LRN has k {k:g} and alpha {alpha:g}, as no published AlexNet has")


def _image_size(graph: Message, initializers: set[str]) -> int | None:
    """Of the one input [N, 3, S, S]; None where the graph leaves it open."""
    for value in graph.messages(_INPUTS):
        if value.string(1) in initializers:
            continue
        shape = value.message(2).message(1).message(2)
        dims = [dim.number(1) for dim in shape.messages(1)]
        if len(dims) == 4 and dims[2] == dims[3] > 0:
            return dims[2]
    return None
