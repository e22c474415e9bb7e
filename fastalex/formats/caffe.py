"""Caffe's files: nets (``.caffemodel``) and mean images (``.binaryproto``).

Both are protocol buffers, read as bytes; every length is checked against what is there.

Source: src/caffe/proto/caffe.proto of BVLC/caffe; protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastalex.formats.layers import Array, ForeignNet

# The fields of a message by their numbers: varints as numbers, anything else as its bytes.
Message = dict[int, list[Any]]

# Fields of NetParameter, and of LayerParameter and its older form: name, type, blobs.
_NAME, _OLD_LAYERS, _LAYERS = 1, 2, 100
_LAYER, _OLD_LAYER = (1, 2, 7), (4, 5, 6)
_LRN, _POOLING = ("LRN", 15), ("Pooling", 17)  # types, in both forms
_MOST_FIELDS = 1_000_000  # of one message: a hostile file of tiny ones would take all memory
_FIXED = {1: 8, 5: 4}  # bytes of the wire types that have no length of their own


def read_message(data: memoryview) -> Message:
    """The fields of a message; what is in them stays bytes.

    Raises:
        ValueError: where ``data`` is no message.
    """
    fields: Message = {}
    place = count = 0
    while place < len(data):
        count += 1
        if count > _MOST_FIELDS:
            raise ValueError(f"a message of more than {_MOST_FIELDS} fields")
        tag, place = _varint(data, place)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, place = _varint(data, place)
            fields.setdefault(number, []).append(value)
            continue
        if wire != 2 and wire not in _FIXED:
            raise ValueError(f"field {number} is of no known type")
        length, place = (_FIXED[wire], place) if wire in _FIXED else _varint(data, place)
        if number == 0 or length > len(data) - place:
            raise ValueError(f"field {number} ends behind its message")
        fields.setdefault(number, []).append(data[place : place + length])
        place += length
    return fields


def read_caffe(file: Message) -> ForeignNet:
    """The layers of a caffemodel; where it normalises behind the pooling, it is CaffeNet."""
    if not {_OLD_LAYERS, _LAYERS} & set(file):
        raise ValueError("of no known format: --help lists them")
    layers: list[tuple[Array, Array]] = []
    norms = []
    for number, (_, kind, blobs) in ((_OLD_LAYERS, _OLD_LAYER), (_LAYERS, _LAYER)):
        for layer in map(read_message, _bytes(file, number)):
            type_ = _text(layer, kind) if number == _LAYERS else layer.get(kind, [0])[-1]
            if type_ in (*_LRN, *_POOLING):
                norms.append(type_ in _LRN)
            parameters = [read_blob(blob) for blob in _bytes(layer, blobs)]
            if parameters and len(parameters) != 2:
                raise ValueError(f"layer {len(layers) + 1} has {len(parameters)} blobs, not 2")
            if parameters:
                layers.append((parameters[0], parameters[1]))
    variant = "caffenet" if norms and not norms[0] else "caffe"
    return ForeignNet(f"caffemodel {_text(file, _NAME)[:40]!r}", layers, variant, bgr=True)


def read_blob(data: memoryview) -> Array:
    """The numbers of a BlobProto in its shape, which has to have as many."""
    blob = read_message(data)
    if shape := _bytes(blob, 7):
        dims = _numbers(read_message(shape[-1]).get(1, []))
    else:
        dims = [_numbers(blob.get(number, [1]))[-1] for number in (1, 2, 3, 4)]
    number, dtype = (5, "<f4") if 5 in blob else (8, "<f8")
    values = np.frombuffer(b"".join(_bytes(blob, number)), dtype)
    if math.prod(dims) != len(values):
        raise ValueError(f"a blob of shape {dims[:8]} has {len(values)} numbers")
    return values.reshape(dims)


def _bytes(message: Message, number: int) -> list[memoryview]:
    found = message.get(number, [])
    if not all(isinstance(value, memoryview) for value in found):
        raise ValueError(f"field {number} is of another type than it has to be")
    return found


def _text(message: Message, number: int) -> str:
    return bytes((_bytes(message, number) or [memoryview(b"")])[-1]).decode("utf-8", "replace")


def _numbers(values: list[Any]) -> list[int]:
    """Varints, packed or not."""
    found: list[int] = []
    for value in values:
        if isinstance(value, int):
            found.append(value)
            continue
        place = 0
        while place < len(value):
            number, place = _varint(value, place)
            found.append(number)
    return found


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """The number that begins at ``place``, and where the next thing begins."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise ValueError("ends in the middle of a number")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (2**64 - 1), place
    raise ValueError("a number of more than 64 bits")
