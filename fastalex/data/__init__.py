"""Labelled images and the batches a net is trained on."""

from fastalex.data.base import Batch, DataError, ImageSource
from fastalex.data.batches import Batches, decode_size
from fastalex.data.folder import FolderImages
from fastalex.data.normalization import MeanImage, Normalization
from fastalex.data.packed import PackedImages
from fastalex.data.sources import color_noise, mean_image, open_sources
from fastalex.data.synthetic import TRAIN_COUNT, VAL_COUNT, SyntheticImages

__all__ = [
    "TRAIN_COUNT",
    "VAL_COUNT",
    "Batch",
    "Batches",
    "DataError",
    "FolderImages",
    "ImageSource",
    "MeanImage",
    "Normalization",
    "PackedImages",
    "SyntheticImages",
    "color_noise",
    "decode_size",
    "mean_image",
    "open_sources",
]
