"""What a run is, decided before its processes start."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastalex.data import ImageDataset, Normalization, decode_size
from fastalex.data.datasets import mean_image, open_datasets
from fastalex.data.fingerprint import Contents
from fastalex.distributed.world import World
from fastalex.training.checkpoints import ResumeState
from fastalex.training.config import Settings


@dataclass(frozen=True)
class RunConfig:
    """Everything that a process needs to know.

    Attributes:
        settings: with every default filled in.
        world: the processes and how they share the work.
        folder: the run's, which exists.
        classes: names of the classes, by label.
        normalization: measured on the training images.
        unreadable: files of ``settings.data`` that every process leaves out, with reasons.
        datasets: the images to train on and to validate, where they are already open.
        resume: where a stopped run goes on; None for a new one.
        images: what the training and the validation set hold.
    """

    settings: Settings
    world: World
    folder: Path
    classes: list[str]
    normalization: Normalization
    unreadable: list[tuple[str, str]]
    datasets: tuple[ImageDataset, ImageDataset] | None = None
    resume: ResumeState | None = None
    images: tuple[Contents, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, for a process that opens the images itself."""
        resume = self.resume
        return {
            "settings": self.settings.to_dict(),
            "world": vars(self.world),
            "folder": str(self.folder),
            "classes": self.classes,
            "normalization": self.normalization.to_dict(),
            "unreadable": self.unreadable,
            "checkpoint": None if resume is None or resume.path is None else str(resume.path),
            "state": None if resume is None else resume.state,
            "images": self.images,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The inverse of ``to_dict``, with the images opened.

        Raises:
            ValueError: where the images, or the checkpoint to go on from, are not to be found here.
        """
        settings, folder = Settings.from_dict(values["settings"]), Path(values["folder"])
        world, unreadable = World(**values["world"]), [(p, why) for p, why in values["unreadable"]]
        size, where = settings.image_size, settings.data
        datasets = open_datasets(where, settings.seed, size, unreadable, quiet=True)
        image = mean_image(datasets[0], settings.normalization, decode_size(size))
        pixels = None if image is None else image.pixels
        scale = Normalization.from_dict(values["normalization"], pixels)
        resume = None
        if values["state"] is not None:
            path = values["checkpoint"] and Path(values["checkpoint"])
            if path is not None and not path.is_file():
                raise ValueError(
                    f"{path}: not on this machine ({socket.gethostname()}); keep the run's folder "
                    "on a disk that all machines of the run share"
                )
            resume = ResumeState(folder, settings, world, {}, path, values["state"])
        return cls(
            settings, world, folder, values["classes"], scale, unreadable, datasets, resume,
            tuple(values["images"]),
        )  # fmt: skip
