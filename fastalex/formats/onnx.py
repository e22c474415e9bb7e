"""ONNX files: the weights of the convolutions and products, and what the LRN between them is."""

from __future__ import annotations

import math
from typing import Any

from fastalex.formats.layers import Array, ForeignNet

# k and alpha of the local response norms.
_NORMS = {(1.0, 1e-4): "caffe", (2.0, 5e-4): "paper", (2.0, 1e-4): "source2012"}
NEEDED = "ONNX files need onnx: pip install 'fastalex[export]'"


def read_onnx(data: memoryview) -> ForeignNet:
    """The layers of an ONNX file, as its Conv and Gemm nodes hold them."""
    try:
        import onnx
    except ImportError as error:
        raise ValueError(NEEDED) from error
    model = onnx.load_model_from_string(bytes(data))
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    layers = []
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            weight, bias = (_array(tensors, node, index) for index in (1, 2))
            if node.op_type == "Gemm" and not _attribute(node, "transB", 0):
                weight = weight.T
            layers.append((weight, bias))
    producer = model.producer_name[:40]
    return ForeignNet(
        f"ONNX of {producer!r}",
        layers,
        _variant(graph.node),
        bgr="caffe" in producer.lower(),
        image_size=_image_size(graph, set(tensors)),
    ).told({pair.key: pair.value for pair in model.metadata_props})


def _array(tensors: dict[str, Any], node: Any, index: int) -> Array:
    from onnx import TensorProto, numpy_helper

    name = node.input[index] if index < len(node.input) else ""
    if name not in tensors:
        raise ValueError(f"a {node.op_type} whose operand {index} is no stored tensor")
    if tensors[name].data_location == TensorProto.EXTERNAL:
        raise ValueError("its weights are in another file; save it as one (external_data=False)")
    values: Array = numpy_helper.to_array(tensors[name])
    if values.dtype.kind != "f":
        raise ValueError(f"{name[:40]!r}: {values.dtype} is not float16, 32 or 64")
    return values


def _attribute(node: Any, name: str, default: float) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _variant(nodes: Any) -> str | None:
    """What the norms say; None where there are none."""
    places = [node for node in nodes if node.op_type in ("LRN", "MaxPool")]
    norms = [node for node in places if node.op_type == "LRN"]
    if not norms:
        return None
    if places[0].op_type == "MaxPool":
        return "caffenet"
    k, alpha = _attribute(norms[0], "bias", 1.0), _attribute(norms[0], "alpha", 1e-4)
    for numbers, variant in _NORMS.items():
        pairs = zip((k, alpha), numbers, strict=True)
        if all(math.isclose(ours, theirs, rel_tol=1e-5) for ours, theirs in pairs):
            return variant
    raise ValueError(f"its LRN has k {k:g} and alpha {alpha:g}, as no published AlexNet has")


def _image_size(graph: Any, initializers: set[str]) -> int | None:
    """Of the one input [N, 3, S, S]; None where the graph leaves it open."""
    for value in graph.input:
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if value.name not in initializers and len(dims) == 4 and dims[2] == dims[3] > 0:
            return int(dims[2])
    return None
