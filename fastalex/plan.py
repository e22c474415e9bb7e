"""What a run is, decided before its processes start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastalex.config import Settings
from fastalex.data import ImageSource, Normalization
from fastalex.data.fingerprint import Contents
from fastalex.launch import World
from fastalex.resume import Start


@dataclass(frozen=True)
class Plan:
    """Everything a process needs to know, decided once before processes start.

    Attributes:
        settings: with every default filled in.
        world: the processes and how they share the work.
        folder: the run's, which exists.
        classes: names of the classes, by label.
        normalization: measured on the training images.
        unreadable: files of ``settings.data`` that every process leaves out, with reasons.
        sources: the images to train on and to validate, where they are already open.
        start: where a stopped run goes on; None for a new one.
        images: what the training and the validation set hold.
    """

    settings: Settings
    world: World
    folder: Path
    classes: list[str]
    normalization: Normalization
    unreadable: list[tuple[str, str]]
    sources: tuple[ImageSource, ImageSource] | None = None
    start: Start | None = None
    images: tuple[Contents, ...] = ()
