"""Labelled images and the batches a net is trained on."""

from fastalex.data.base import Batch, DataError, ImageSource, Normalization
from fastalex.data.batches import Batches, decode_size
from fastalex.data.folder import FolderImages
from fastalex.data.packed import PackedImages
from fastalex.data.sources import open_sources
from fastalex.data.synthetic import TRAIN_COUNT, VAL_COUNT, SyntheticImages

__all__ = [
    "TRAIN_COUNT",
    "VAL_COUNT",
    "Batch",
    "Batches",
    "DataError",
    "FolderImages",
    "ImageSource",
    "Normalization",
    "PackedImages",
    "SyntheticImages",
    "decode_size",
    "open_sources",
]
