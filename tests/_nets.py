"""Nets of the published make with fewer units, and weights files of such nets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastalex import AlexNet
from fastalex.data import MeanImage, Normalization
from fastalex.model.ablations import get_variant
from fastalex.model.variants import Variant
from fastalex.training.weights import save_weights
from tests._small_train import thin

CLASSES = ["blue", "green", "grey", "lime", "pink", "red", "teal"]
SIZE = 40


def narrow(name: str) -> Variant:
    """A published net with a quarter of the channels, and 64 units in fc6 and in fc7."""
    return thin(get_variant(name))


def random_weights(
    path: Path, seed: int, image: MeanImage | None = None, /, **changes: object
) -> Path:
    """Weights of a small random net; its probabilities differ from image to image.

    Args:
        path: of the file.
        seed: of the weights.
        image: the mean image that its metadata speak of.
        changes: of the metadata.
    """
    normalization = {"mean": [100.0, 110.0, 120.0 + seed], "std": [50.0, 60.0, 70.0]}
    if image is not None:
        normalization = Normalization((0, 0, 0), (50, 60, 70), image).to_dict()
    metadata: dict[str, Any] = {
        "variant": "paper-without-fc6+fc7",
        "classes": CLASSES,
        "image_size": SIZE,
        "normalization": normalization,
        "dropout": 0.5,
        **changes,
    }
    metadata["num_classes"] = len(metadata["classes"])
    net = AlexNet(metadata["num_classes"], 0.5, metadata["variant"])
    net.init_parameters("he", torch.Generator().manual_seed(seed))
    save_weights(path, net.state_dict(), metadata, image)
    return path
