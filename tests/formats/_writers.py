"""Files of other programs, written from a net of ours by those programs' libraries or rules."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from fastalex import AlexNet
from fastalex.model.ablations import get_variant

Layers = list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]
SMALL = "-without-fc6+fc7"  # 15 MB instead of 244


def layers_of(net: AlexNet, bgr: bool = False) -> Layers:
    """Weight and bias of each layer, conv1's turned round where the file's net reads BGR."""
    arrays = [p.detach().numpy().copy() for p in net.parameters()]
    if bgr:
        arrays[0] = arrays[0][:, ::-1].copy()
    return list(zip(arrays[::2], arrays[1::2], strict=True))


@lru_cache
def caffe_messages() -> dict[str, Any]:
    """The classes that protobuf makes of the parts of caffe.proto that hold weights."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    fields = {
        "BlobShape": [("dim", 1, "INT64", "packed")],
        "BlobProto": [
            ("num", 1, "INT32", ""), ("channels", 2, "INT32", ""), ("height", 3, "INT32", ""),
            ("width", 4, "INT32", ""), ("data", 5, "FLOAT", "packed"),
            ("shape", 7, "BlobShape", ""), ("double_data", 8, "DOUBLE", "packed"),
        ],
        "LayerParameter": [
            ("name", 1, "STRING", ""), ("type", 2, "STRING", ""), ("bottom", 3, "STRING", "many"),
            ("blobs", 7, "BlobProto", "many"), ("phase", 10, "INT32", ""),
        ],
        "V1LayerParameter": [
            ("bottom", 2, "STRING", "many"), ("name", 4, "STRING", ""), ("type", 5, "INT32", ""),
            ("blobs", 6, "BlobProto", "many"), ("blobs_lr", 7, "FLOAT", "many"),
        ],
        "NetParameter": [
            ("name", 1, "STRING", ""), ("layers", 2, "V1LayerParameter", "many"),
            ("input_dim", 4, "INT32", "many"), ("layer", 100, "LayerParameter", "many"),
        ],
    }  # fmt: skip
    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package="caffe", syntax="proto2")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, members in fields.items():
        message = file.message_type.add(name=name)
        for field, number, kind, many in members:
            added = message.field.add(name=field, number=number)
            added.label = kinds.LABEL_REPEATED if many else kinds.LABEL_OPTIONAL
            if kind in fields:
                added.type, added.type_name = kinds.TYPE_MESSAGE, f".caffe.{kind}"
            else:
                added.type = getattr(kinds, f"TYPE_{kind}")
            if many == "packed":
                added.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"caffe.{name}"))
        for name in fields
    }


def _blob(array: npt.NDArray[np.float32], old: bool) -> Any:
    blob = caffe_messages()["BlobProto"]()
    if old:  # four axes, the first of which are 1
        shape = (1,) * (4 - array.ndim) + array.shape
        blob.num, blob.channels, blob.height, blob.width = shape
        blob.data.extend(array.ravel())
    else:
        blob.shape.dim.extend(array.shape)
        blob.double_data.extend(array.ravel()) if array.ndim == 1 else blob.data.extend(
            array.ravel()
        )
    return blob


def caffemodel(path: Path, net: AlexNet, old: bool = False) -> None:
    """As Caffe writes it, or as it did before 2014 (``old``)."""
    file = caffe_messages()["NetParameter"](name="AlexNet", input_dim=[10, 3, 227, 227])
    pooled = iter(layers_of(net, bgr=True))
    order = [("Pooling", 17), ("LRN", 15)]
    first = order if "caffenet" in net.variant.name else order[::-1]
    for spec in net.variant.convolutions:
        weight, bias = next(pooled)
        kinds = [("Convolution", 4), ("ReLU", 18), *(first if spec.norm else first[:0])]
        _add(file, kinds, [weight, bias], old)
    for weight, bias in pooled:
        _add(file, [("InnerProduct", 14), ("Dropout", 6)], [weight, bias], old)
    path.write_bytes(file.SerializeToString())


def _add(file: Any, kinds: list[tuple[str, int]], blobs: list[Any], old: bool) -> None:
    for place, (kind, number) in enumerate(kinds):
        layer = (file.layers if old else file.layer).add(name=f"layer of {kind}")
        layer.type = number if old else kind
        if place == 0:
            layer.blobs.extend(_blob(array, old) for array in blobs)


def onnx_zoo(path: Path, net: AlexNet, size: int, producer: str = "onnx-caffe2") -> None:
    """The graph of a one-tower net with LRN, as the ONNX zoo's bvlcalexnet has it; it reads BGR."""
    import onnx
    from onnx import helper, numpy_helper

    nodes, tensors, last = [], [], "data_0"

    def add(kind: str, inputs: list[str], **attributes: Any) -> None:
        nonlocal last
        last, source = f"{kind}_{len(nodes)}", last
        nodes.append(helper.make_node(kind, [source, *inputs], [last], **attributes))

    def stored(array: npt.NDArray[Any]) -> str:
        name = f"w{len(tensors)}"
        tensors.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    layers = iter(layers_of(net, bgr=True))
    for spec in net.variant.convolutions:
        weight, bias = next(layers)
        p, k = spec.padding, spec.kernel_size
        add("Conv", [stored(weight), stored(bias)], group=spec.groups, kernel_shape=[k, k],
            strides=[spec.stride] * 2, pads=[p] * 4)  # fmt: skip
        add("Relu", [])
        pool = {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}
        norm = spec.norm
        lrn = norm and {"size": 5, "alpha": norm.alpha, "beta": 0.75, "bias": norm.k}
        kinds = [("LRN", lrn)] * bool(lrn) + [("MaxPool", pool)] * spec.pool
        for kind, attributes in kinds[::-1] if spec.norm_after_pool else kinds:
            add(kind, [], **attributes)
    add("Flatten", [])
    for number, (weight, bias) in enumerate(layers):
        if number:
            add("Relu", [])
        transposed = number == 0  # both forms
        matrix = weight if transposed else weight.T
        add("Gemm", [stored(matrix), stored(bias)], **({"transB": 1} if transposed else {}))
    images = helper.make_tensor_value_info("data_0", onnx.TensorProto.FLOAT, [1, 3, size, size])
    logits = helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "bvlc_alexnet", [images], [logits], tensors)
    opset = [helper.make_opsetid("", 13)]
    model = helper.make_model(graph, producer_name=producer, opset_imports=opset, ir_version=8)
    path.write_bytes(model.SerializeToString())


def torch_file(path: Path, net: AlexNet, legacy: bool = False) -> None:
    state = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    found = {"epoch": 90, "state_dict": state} if legacy else dict(net.state_dict())
    torch.save(found, path, _use_new_zipfile_serialization=not legacy)


def safetensors_file(path: Path, net: AlexNet) -> None:
    save_file(dict(net.state_dict()), path, {"format": "pt"})


def cuda_convnet(path: Path, net: AlexNet) -> None:
    """A checkpoint of net 145: towers apart, S:layers/layers-145.cfg; fc7b reads tower b first."""
    layers: dict[str, dict[str, Any]] = {"data": {"name": "data", "type": "data"}}
    below, specs = ["data"], iter(net.variant.convolutions)
    arrays = layers_of(net)
    for number, (weight, bias) in enumerate(arrays):
        last, conv = number == len(arrays) - 1, weight.ndim == 4
        spec = next(specs) if conv else None
        names = [f"fc{number}"] if last else [f"x{number}a", f"x{number}b"]
        outputs = np.split(weight, len(names)), np.split(bias, len(names))
        for tower, (name, w, b) in enumerate(zip(names, *outputs, strict=True)):
            reads = below if spec is None or spec.groups == 1 else [below[tower]]
            matrix = w.reshape(len(w), -1).T
            parts = dict(zip(reads, np.split(matrix, len(reads)), strict=True))
            order = reads[::-1] if tower else reads
            layers[name] = {
                "name": name, "type": "conv" if conv else "fc", "inputs": order,
                "weights": [np.asfortranarray(parts[i]) for i in order],
                "biases": b.reshape(-1, 1), "filterSize": [w.shape[-1]] * len(order),
                "inputLayers": [layers[i] for i in order], "epochs": np.float64(1.0),
            }  # fmt: skip
        below = names
    shuffled = {name: layers[name] for name in sorted(layers, reverse=True)}  # Python 2's dict
    file = {"model_state": {"layers": shuffled, "epoch": 90}, "op": None}
    path.write_bytes(pickle.dumps(file, protocol=2))


def make_net(name: str, num_classes: int = 7) -> AlexNet:
    net = AlexNet(num_classes, variant=get_variant(name), fused=False).eval()
    net.init_parameters("he", torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(-0.1, 0.1)
    return net


Writer = Callable[[Path, AlexNet], None]
# What writes a file, of which variant, and what the command has to be told.
FORMATS: dict[str, tuple[Writer, str]] = {
    "caffemodel": (caffemodel, "caffe"),
    "caffemodel of 2013": (lambda path, net: caffemodel(path, net, old=True), "caffe"),
    "CaffeNet": (caffemodel, "caffenet"),
    "ONNX zoo": (lambda path, net: onnx_zoo(path, net, 227), "caffe"),
    "torchvision": (torch_file, "owt"),
    "torch's old format": (lambda path, net: torch_file(path, net, legacy=True), "owt"),
    "safetensors": (safetensors_file, "paper"),
    "cuda-convnet": (cuda_convnet, "source2012"),
}
