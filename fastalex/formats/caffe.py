"""Caffe's files: nets (``.caffemodel``) and mean images (``.binaryproto``).

Source: src/caffe/proto/caffe.proto of BVLC/caffe.
"""

from __future__ import annotations

import math

from fastalex.formats.layers import Array, ForeignNet
from fastalex.formats.protobuf import Message

# Fields of NetParameter, and of LayerParameter and its older form: name, type, blobs.
_NAME, _OLD_LAYERS, _LAYERS = 1, 2, 100
_LAYER, _OLD_LAYER = (1, 2, 7), (4, 5, 6)
_LRN, _POOLING = ("LRN", 15), ("Pooling", 17)  # types, in both forms


def is_caffe(file: Message) -> bool:
    return _LAYERS in file or _OLD_LAYERS in file


def read_caffe(file: Message) -> ForeignNet:
    """The layers of a caffemodel; where it normalises behind the pooling, it is CaffeNet.

    Raises:
        ValueError: where the file is damaged.
    """
    layers: list[tuple[Array, Array]] = []
    norms = []
    for number, (_, kind, blobs) in ((_OLD_LAYERS, _OLD_LAYER), (_LAYERS, _LAYER)):
        for layer in file.messages(number):
            type_ = layer.string(kind) if number == _LAYERS else layer.number(kind)
            if type_ in (*_LRN, *_POOLING):
                norms.append(type_ in _LRN)
            parameters = [read_blob(blob) for blob in layer.messages(blobs)]
            if parameters and len(parameters) != 2:
                raise ValueError(f"layer {len(layers) + 1} has {len(parameters)} blobs, not 2")
            if parameters:
                layers.append((parameters[0], parameters[1]))
    variant = "caffenet" if norms and not norms[0] else "caffe"
    name = file.string(_NAME)[:40]
    return ForeignNet(f"caffemodel {name!r}", layers, variant, bgr=True)


def read_blob(blob: Message) -> Array:
    """The numbers of a BlobProto in its shape.

    Raises:
        ValueError: where there are more or fewer than its shape says.
    """
    dims = blob.message(7).numbers(1) if 7 in blob else [blob.number(n, 1) for n in (1, 2, 3, 4)]
    values = blob.array(5, "<f4") if 5 in blob else blob.array(8, "<f8")
    if math.prod(dims) != len(values):
        raise ValueError(f"a blob of shape {dims[:8]} has {len(values)} numbers")
    return values.reshape(dims)
