"""ONNX files: the weights of the convolutions and products."""

from __future__ import annotations

from typing import Any

from fastalex.formats.layers import Array, ForeignNet

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
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            if node.op_type == "Gemm" and not transposed:
                weight = weight.T
            layers.append((weight, bias))
    producer = model.producer_name[:40]
    caffe, size = "caffe" in producer.lower(), _image_size(graph, set(tensors))
    first = next((node.op_type for node in graph.node if node.op_type in ("LRN", "MaxPool")), "")
    variant = {"LRN": "caffe", "MaxPool": "caffenet"}.get(first) if caffe else None
    net = ForeignNet(f"ONNX of {producer!r}", layers, variant, bgr=caffe, image_size=size)
    return net.told({pair.key: pair.value for pair in model.metadata_props})


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


def _image_size(graph: Any, initializers: set[str]) -> int | None:
    """Of the one input [N, 3, S, S]; None where the graph leaves it open."""
    for value in graph.input:
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if value.name not in initializers and len(dims) == 4 and dims[2] == dims[3] > 0:
            return int(dims[2])
    return None
