"""The images of a batch as bytes, ready to be copied to a device."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from fastalex.data.base import Pixels


def load_pixels(
    read: Callable[[int, int], Pixels], indices: npt.NDArray[np.int64], size: int
) -> torch.Tensor:
    """Images as uint8 [n, size, size, 3], RGB.

    Where there is a GPU the memory is page-locked, so that a copy to the device is quicker and,
    with ``non_blocking=True``, goes on beside the step before.

    Args:
        read: called with an index and ``size``; a source's ``image``.
        indices: int64 [n], which ones.
        size: side in pixels.
    """
    shape = (len(indices), size, size, 3)
    batch = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    for out, index in zip(batch.numpy(), indices.tolist(), strict=True):
        out[:] = read(index, size)
    return batch
