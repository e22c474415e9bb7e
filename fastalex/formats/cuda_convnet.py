"""Checkpoints of cuda-convnet, which are pickles.

A pickle is a program. Of what it may call, only numpy's arrays are there; everything else is
refused before it is called. The reader raises whatever a file of another kind makes of it.
"""

from __future__ import annotations

import graphlib
import io
import pickle
from typing import Any

import numpy as np

from fastalex.formats.layers import Array, ForeignNet

_ALLOWED = {
    (f"numpy.{core}.multiarray", name)
    for core in ("core", "_core")
    for name in ("_reconstruct", "scalar")
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
# What a checkpoint holds besides the net: the command line that trained it.
_INERT = ("options", "convnet", "gpumodel", "layer", "python_util.options")


class _Left:
    """Stands for an object that is not needed; nothing of it is run."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module in _INERT:
            return _Left
        raise ValueError(f"it asks for {module}.{name}, which is not run"[:200])


def read_cuda_convnet(data: memoryview) -> ForeignNet:
    """The layers of a checkpoint of the authors' program, two towers put together.

    A layer's weight is [inputs, outputs], one for each layer that it reads; the halves of a layer
    are called alike but for a last ``a`` or ``b``.

    Source: S:layer.py, WeightLayerParser; S:layers/layers-145.cfg.
    """
    found = _Unpickler(io.BytesIO(data), encoding="latin1").load()["model_state"]["layers"]
    found = list(found.values()) if isinstance(found, dict) else found
    named = {str(layer["name"]): layer for layer in found}
    reads = {name: [str(i) for i in layer.get("inputs", [])] for name, layer in named.items()}
    halves: dict[str, list[str]] = {}
    for name in graphlib.TopologicalSorter(reads).static_order():
        if name in named and "weights" in named[name]:
            tower = name[-1] in "ab" and {name[:-1] + "a", name[:-1] + "b"} <= set(named)
            halves.setdefault(name[:-1] if tower else name, []).append(name)
    layers = [_together([named[n] for n in sorted(names)]) for names in halves.values()]
    return ForeignNet("cuda-convnet checkpoint", layers, "source2012")


def _together(halves: list[dict[str, Any]]) -> tuple[Array, Array]:
    """The weight and bias of a layer of which each tower has a half of the outputs."""
    weights, biases = [], []
    for layer in halves:
        parts, inputs = layer["weights"], layer["inputs"]
        parts = [parts] if isinstance(parts, np.ndarray) else list(parts)
        # The second tower may name what it reads of its own first.
        pairs = sorted(zip(map(str, inputs), parts, strict=True), key=lambda pair: pair[0])
        weight = np.concatenate([_matrix(part) for _, part in pairs])
        weights.append(weight.T)
        biases.append(_matrix(layer["biases"]).reshape(-1))
    weight, bias = np.concatenate(weights), np.concatenate(biases)
    if halves[0]["type"] == "conv":
        side = int(np.ravel(halves[0]["filterSize"])[0])
        if side < 1 or weight.shape[1] % side**2:
            raise ValueError(f"filters of side {side} do not fit {weight.shape[1]} weights")
        weight = weight.reshape(len(weight), -1, side, side)
    return weight, bias


def _matrix(value: Any) -> Array:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.ndim != 2:
        raise ValueError("weights that are no matrix of floating-point numbers")
    return value
