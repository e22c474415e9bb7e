"""Labelled images, packing, augmentation, and the batches a net is trained on.

What is named here needs no torch, so that packing starts without it.
``batches``, ``augment`` and ``datasets`` do need it.
"""

from fastalex.data.base import DataError, ImageDataset, decode_size
from fastalex.data.folder import FolderImages
from fastalex.data.normalization import MeanImage, Normalization
from fastalex.data.packed import PackedImages
from fastalex.data.synthetic import TRAIN_COUNT, VAL_COUNT, SyntheticImages

__all__ = [
    "TRAIN_COUNT",
    "VAL_COUNT",
    "DataError",
    "FolderImages",
    "ImageDataset",
    "MeanImage",
    "Normalization",
    "PackedImages",
    "SyntheticImages",
    "decode_size",
]
