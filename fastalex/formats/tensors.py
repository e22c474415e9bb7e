"""State dicts of torch: ``.pth`` files and safetensors, named as torchvision names them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fastalex.data.packed import file_digest
from fastalex.formats.layers import ForeignNet

_HASH = re.compile(r"-([0-9a-f]{8,64})\.[^.]+$")  # as in alexnet-owt-7be5be79.pth
_PARAMETER = re.compile(r"(features|classifier)\.(\d+)\.(weight|bias)")


def read_torch(path: Path) -> ForeignNet:
    """The layers of a file of ``torch.save``; of its pickle nothing but tensors is made.

    Raises:
        ValueError: where the file's name carries a checksum that the file has not.
    """
    match = _HASH.search(path.name)
    digest = file_digest(path) if match else ""
    if match and not digest.startswith(match[1]):
        raise ValueError(f"its SHA-256 begins {digest[:8]}, its name says {match[1]}: damaged")
    found = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    return _net("state dict of torch", found, path)


def read_safetensors(path: Path) -> ForeignNet:
    """The layers of a safetensors file with torchvision's names."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if "fastalex" in metadata:
            raise ValueError("already weights of fastalex's: give them to the commands")
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    return _net("safetensors", tensors, path).told(metadata)


def _net(kind: str, tensors: Any, path: Path) -> ForeignNet:
    if not isinstance(tensors, Mapping):
        raise ValueError(f"holds a {type(tensors).__name__}, not a state dict")
    parts: dict[tuple[str, int], dict[str, Any]] = {}
    for name, tensor in tensors.items():
        # DataParallel and others put a name of theirs in front or in the middle.
        match = _PARAMETER.fullmatch(re.sub(r"(module|model|_orig_mod)\.", "", str(name)))
        if match is None:
            raise ValueError(f"{str(name)[:60]!r} is no parameter of torchvision's alexnet")
        whole = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        # A view may promise more numbers than the file has.
        if not whole or tensor.numel() * tensor.element_size() > path.stat().st_size:
            raise ValueError(f"{name!r} is no tensor of floating-point numbers in this file")
        parts.setdefault((match[1], int(match[2])), {})[match[3]] = tensor
    layers = []
    for key in sorted(parts, key=lambda key: (key[0] == "classifier", key[1])):
        if len(parts[key]) != 2:
            raise ValueError(f"{key[0]}.{key[1]} lacks its weight or its bias")
        weight, bias = (parts[key][part].float().numpy() for part in ("weight", "bias"))
        layers.append((weight, bias))
    return ForeignNet(kind, layers)
