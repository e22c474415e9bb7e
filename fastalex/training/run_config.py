"""What a run is, as its first process decided it."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastalex.data import ImageDataset, Normalization, decode_size
from fastalex.data.datasets import mean_image, open_datasets
from fastalex.data.fingerprint import Contents
from fastalex.distributed.world import World
from fastalex.training.config import Settings


@dataclass(frozen=True)
class RunConfig:
    """Everything that a process needs to know."""

    settings: Settings
    world: World
    folder: Path  # which exists
    classes: list[str]  # by label
    normalization: Normalization  # measured on the training images
    unreadable: list[tuple[str, str]]  # files that every process leaves out, with reasons
    datasets: tuple[ImageDataset, ImageDataset]  # to train on and to validate
    images: tuple[Contents, ...] = ()  # what they hold
    checkpoint: Path | None = None  # that a stopped run goes on from
    state: dict[str, Any] = field(default_factory=dict)  # its other half, besides tensors

    def to_json(self) -> str:
        """For a process that opens the images itself."""
        changed = {
            "settings": self.settings.to_dict(),
            "world": vars(self.world),
            "folder": str(self.folder),
            "normalization": self.normalization.to_dict(),
            "datasets": None,
            "checkpoint": self.checkpoint and str(self.checkpoint),
        }
        return json.dumps({**vars(self), **changed})

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """The inverse of ``to_json``, with the images opened.

        Raises:
            ValueError: where the images, or the checkpoint to go on from, are not to be found here.
        """
        values = json.loads(text)
        settings = Settings.from_dict(values["settings"])
        unreadable = [(path, why) for path, why in values["unreadable"]]
        size = settings.image_size
        datasets = open_datasets(settings.data, settings.seed, size, unreadable, quiet=True)
        image = mean_image(datasets[0], settings.normalization, decode_size(size))
        checkpoint = values["checkpoint"] and Path(values["checkpoint"])
        if checkpoint is not None and not checkpoint.is_file():
            raise ValueError(
                f"{checkpoint}: not on this machine ({socket.gethostname()}); keep the run's "
                "folder on a disk that all machines of the run share"
            )
        changed = {
            "settings": settings,
            "world": World(**values["world"]),
            "folder": Path(values["folder"]),
            "normalization": Normalization.from_dict(
                values["normalization"], None if image is None else image.pixels
            ),
            "unreadable": unreadable,
            "datasets": datasets,
            "images": tuple(values["images"]),
            "checkpoint": checkpoint,
        }
        return cls(**{**values, **changed})
