"""Curves and pictures of a run for TensorBoard."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

# Tags by the names in metrics.jsonl.
_STEP = {
    "loss": "train/loss",
    "lr": "train/learning rate",
    "grad_norm": "train/gradient norm",
    "loss_scale": "train/loss scale",
    "images_per_s": "speed/images per second",
    "data_seconds": "speed/seconds waited for data",
    "exchange_seconds": "speed/seconds of exchange",
    "compute_seconds": "speed/seconds of computing",
}
_EPOCH = {
    "val_loss": "validation/loss",
    "top1": "validation/top-1",
    "top5": "validation/top-5",
}
_COLUMNS = 16  # kernels in a row of the picture
_ZOOM = 4  # pixels of the picture along each side of a weight


def check_tensorboard() -> None:
    """Raise unless the package that writes TensorBoard's files is there.

    Raises:
        ValueError: one line that says how to get it.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "--tensorboard: the package tensorboard is missing, "
            "install it with: pip install 'fastalex[tensorboard]'"
        )


class Curves:
    """Writes the records of a run for TensorBoard.

    Args:
        folder: for its files.
        step: last step of an earlier part of the run; what was written behind it is hidden.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow, and its package is optional

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)  # type: ignore[no-untyped-call]

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a record of metrics.jsonl."""
        tags = _STEP if record["kind"] == "step" else _EPOCH
        for name, tag in tags.items():
            if record.get(name) is not None:
                self._writer.add_scalar(tag, record[name], record["step"])

    def add_kernels(self, weight: torch.Tensor, step: int) -> None:
        """Add conv1's kernels, ``weight`` [maps, 3, height, width], as one picture (P§6.1)."""
        self._writer.add_image("conv1", kernel_grid(weight), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def kernel_grid(weight: torch.Tensor) -> torch.Tensor:
    """Kernels [maps, 3, height, width] as one picture [3, H, W] from 0 to 1, 16 in a row.

    Each kernel is scaled on its own, so that its zero is grey and its largest weight 0 or 1.
    """
    weight = weight.detach().float().cpu()
    scale = weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    kernels = F.pad((0.5 + weight / (2 * scale)), (0, 1, 0, 1), value=1.0)
    kernels = F.pad(kernels, (0, 0, 0, 0, 0, 0, 0, -len(kernels) % _COLUMNS), value=1.0)
    _, channels, height, width = kernels.shape
    rows = kernels.reshape(-1, _COLUMNS, channels, height, width)
    picture = rows.permute(2, 0, 3, 1, 4).reshape(channels, -1, _COLUMNS * width)
    return picture.repeat_interleave(_ZOOM, 1).repeat_interleave(_ZOOM, 2)
