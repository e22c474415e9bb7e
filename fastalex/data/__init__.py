"""Labelled images and the batches a net is trained on."""

import importlib
from typing import TYPE_CHECKING, Any

from fastalex.data.base import DataError, ImageDataset
from fastalex.data.folder import FolderImages
from fastalex.data.normalization import MeanImage, Normalization
from fastalex.data.packed import PackedImages
from fastalex.data.synthetic import TRAIN_COUNT, VAL_COUNT, SyntheticImages

if TYPE_CHECKING:
    from fastalex.data.batches import Batch, Batches, Share, Transform, decode_size
    from fastalex.data.datasets import color_noise, mean_image, open_datasets

__all__ = [
    "TRAIN_COUNT",
    "VAL_COUNT",
    "Batch",
    "Batches",
    "DataError",
    "FolderImages",
    "ImageDataset",
    "MeanImage",
    "Normalization",
    "PackedImages",
    "Share",
    "SyntheticImages",
    "Transform",
    "color_noise",
    "decode_size",
    "mean_image",
    "open_datasets",
]

# These need torch, without which a process that packs images starts.
_WITH_TORCH = {
    "Batch": "batches",
    "Batches": "batches",
    "Share": "batches",
    "Transform": "batches",
    "decode_size": "batches",
    "color_noise": "datasets",
    "mean_image": "datasets",
    "open_datasets": "datasets",
}


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCH:
        return getattr(importlib.import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
