"""Training that begins with other weights, and parts of a net that stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastalex.data import Normalization
from fastalex.data.normalization import INIT_FROM
from fastalex.model.alexnet import AlexNet
from fastalex.training.weights import load_mean_image, load_weights, read_metadata

FREEZES = {
    "features": "the convolutions",
    "hidden": "all but the last layer",
}


def with_file(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with what the file of --init-from says where they say nothing."""
    path, given = options["init_from"], dict(options)
    if path is None:
        if options["normalization"] == INIT_FROM:
            raise ValueError(f"--normalization {INIT_FROM} needs --init-from W")
        return given
    metadata = read_metadata(path)
    missing = {"variant", "image_size", "normalization", "classes"} - set(metadata)
    if missing:
        raise ValueError(f"--init-from {path}: its metadata lack {', '.join(sorted(missing))}")
    for name in ("variant", "image_size"):
        if given[name] is None:
            given[name] = metadata[name]
    if given["normalization"] is None:
        given["normalization"] = INIT_FROM
    if given["variant"] != metadata["variant"]:
        raise ValueError(
            f"--init-from {path}: it is of variant {metadata['variant']}, leave out --variant "
            f"{given['variant']}"
        )
    return given


def normalization(path: Path) -> Normalization:
    """How a weights file's net has its images normalised; a mean image as its channels' means."""
    found = Normalization.from_dict(read_metadata(path)["normalization"], load_mean_image(path))
    return Normalization(found.mean, found.std)


def begin_with(model: AlexNet, path: Path, classes: list[str]) -> bool:
    """Give ``model`` the weights of a file, but for the last layer where the classes are others.

    Args:
        model: of the file's variant, on the CPU or, to find what is wrong, on ``meta``.
        path: of the weights file.
        classes: that the model is to tell apart.

    Returns:
        Whether the last layer was taken too.

    Raises:
        ValueError: where the file is damaged or its weights do not fit.
    """
    tensors, metadata = load_weights(path)
    same = metadata.get("classes") == classes
    if not same:
        last = f"classifier.{len(model.classifier) - 1}."
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(last)}
    own = model.state_dict()
    wrong = [n for n, t in tensors.items() if n not in own or own[n].shape != t.shape]
    if wrong:
        raise ValueError(
            f"--init-from {path}: {wrong[0]} does not fit variant {model.variant.name}"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return same


def freeze(model: AlexNet, part: str | None) -> None:
    """Let training leave a part of ``model``, one of ``FREEZES``, as it is."""
    parts: dict[str | None, list[torch.nn.Module]] = {
        None: [],
        "features": [model.features],
        "hidden": [model.features, model.classifier[:-1]],
    }
    for module in parts[part]:
        module.requires_grad_(False)
