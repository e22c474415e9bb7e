"""What a run is: its first process decides and checks it before any of them trains."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastalex.common import interrupts
from fastalex.common.interrupts import Interrupted
from fastalex.data import DataError, ImageDataset, MeanImage, Normalization, decode_size
from fastalex.data.datasets import color_noise, mean_image, open_datasets
from fastalex.data.fingerprint import Contents, contents, describe_changes
from fastalex.data.normalization import INIT_FROM, MEAN_IMAGES
from fastalex.distributed.launch import TrainingError
from fastalex.distributed.world import World, find_world, has_bf16, rank
from fastalex.model.alexnet import AlexNet
from fastalex.training import check, checkpoints, fine_tuning
from fastalex.training.checkpoints import ResumeState
from fastalex.training.config import (
    PRECISIONS,
    Settings,
    chosen_variant,
    describe_setting,
    setting_names,
)
from fastalex.training.recipes import INITIALISATIONS, MOMENTUM_RULES
from fastalex.training.run_folder import RunFolder, find_attempt, next_free
from fastalex.training.schedule import describe_schedule
from fastalex_kernels.common.backend import gluon_mode


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


def prepare(options: Mapping[str, Any]) -> tuple[RunFolder, RunConfig | None]:
    """Check everything a user can get wrong, claim the run's folder and say what was chosen.

    Returns:
        The folder, claimed, and the configuration; None where the run in it is finished.

    Raises:
        ValueError: for what is wrong; nothing was written.
    """
    options = fine_tuning.with_file(options)
    folder, resume = _find(options)
    try:
        return folder, _prepare(options, folder, resume)
    except BaseException as error:
        if folder.running:
            with contextlib.suppress(TrainingError):
                end(folder, "interrupted" if isinstance(error, Interrupted) else "failed")
        folder.release()
        raise


def end(folder: RunFolder | None, status: str) -> None:
    """Note how the run ended and let go of its folder; nothing in a process that has none.

    Raises:
        TrainingError: where that can't be written.
    """
    if folder is None:
        return
    with interrupts.blocked():
        try:
            folder.end(status)
        except (OSError, ValueError) as error:
            line = f"{folder.path}: run.json can't say that the run is {status}: {error}"
            raise TrainingError(line) from error
        finally:
            folder.release()


def new_place(options: Mapping[str, Any]) -> Path:
    """The folder of a run that was not told where to write."""
    return next_free(chosen_variant(options), options["seed"] or 0)


def _choose_world(options: Mapping[str, Any], resume: ResumeState | None) -> World:
    variant = chosen_variant(options) if resume is None else resume.settings.variant
    world = find_world(options["gpus"], variant, options["threads"])
    if resume is None or options["threads"] or world.processes != resume.world.processes:
        return world
    # Sums are taken in another order by another number of threads.
    return replace(world, threads=resume.world.threads)


def _find(options: Mapping[str, Any]) -> tuple[RunFolder, ResumeState | None]:
    """The run's folder, claimed, and where the run in it goes on; None for a new one."""
    resumed, output = options["resume"], options["output"]
    option = "--output" if resumed is None else "--resume"
    if resumed is not None:
        if output is not None:
            raise ValueError("--resume writes to the run's own folder: leave out --output")
        if not RunFolder(resumed).holds_run:
            raise ValueError(f"--resume {resumed}: no run in it, there is no run.json")
    place = resumed or output or find_attempt()
    while place is None:
        with contextlib.suppress(FileExistsError):  # another run was quicker
            return RunFolder.claim(new_place(options), new=True), None
    folder = RunFolder.claim(place, option)
    if not folder.holds_run:
        return folder, None
    try:
        resume, damaged = checkpoints.find(place, option)
    except BaseException:
        folder.release()
        raise
    for line in damaged:
        _warn(f"{line}; the checkpoint before it is used")
    return folder, resume


def _prepare(
    options: Mapping[str, Any], folder: RunFolder, resume: ResumeState | None
) -> RunConfig | None:
    world = _choose_world(options, resume)
    if resume is None:
        bf16 = options["precision"] in (None, "auto") and has_bf16(world)
        settings = Settings.choose(options, world.device_type, bf16)
    else:
        settings = resume.choose(options, named=options["resume"] is not None)
        resume = replace(resume, settings=settings)
        if resume.finished:
            checkpoints.drop(folder, resume.path, settings.keep_checkpoints)
            return None
    _check(settings, world)
    datasets = train, val = open_datasets(settings.data, settings.seed, settings.image_size)
    color_noise(train, settings.color_noise)  # raises what can't be
    side, images = decode_size(settings.image_size), (contents(train), contents(val))
    image = mean_image(train, settings.normalization, side)
    lines, classes = [], list(train.classes)
    if resume is not None and resume.path is not None:
        _check_same_images(resume, train, images, options["allow_changed_images"])
        scale = _kept_normalization(resume, image)
    elif settings.normalization == INIT_FROM and settings.init_from is not None:
        scale = fine_tuning.normalization(settings.init_from)
    else:
        scale = Normalization.measure(train, side).scaled(settings.normalization, image)
    if settings.init_from is not None and (resume is None or resume.path is None):
        model = _meta_model(len(classes), settings.variant)
        same = fine_tuning.begin_with(model, settings.init_from, classes)
        last = "" if same else " but for the last layer, which is drawn anew for these classes"
        lines = [f"begins with: {settings.init_from}{last}"]
    if settings.freeze is not None:
        lines += [f"not trained: {fine_tuning.FREEZES[settings.freeze]}"]
    config = RunConfig(
        settings,
        world,
        folder.path,
        classes,
        scale,
        [bad for dataset in datasets for bad in getattr(dataset, "unreadable", [])],
        datasets,
        images,
        *(() if resume is None else (resume.path, resume.state)),
    )
    if resume is not None:
        checkpoints.drop(folder, resume.path, settings.keep_checkpoints)
        lines += _describe_resume(resume, world)
    after = None if resume is None else resume.step
    folder.begin(options, settings.to_dict(), vars(world), after)
    for line in _describe(config) + lines:
        print(line, flush=True)
    return config


def _meta_model(classes: int, variant: str) -> AlexNet:
    """A net that tells its sizes and holds no numbers."""
    with torch.device("meta"):
        return AlexNet(classes, variant=variant)


def _check(settings: Settings, world: World) -> None:
    """Raise unless the settings go with each other and with the world."""
    check.mode()  # of the environment, as the next
    gluon_mode()
    size, batch, replicas = settings.image_size, settings.batch_size, world.replicas
    if settings.augmentation == "resized" and settings.normalization in MEAN_IMAGES:
        raise ValueError(
            f"--augmentation resized: parts of any size have no mean image; leave it out or use "
            f"another --normalization than {settings.normalization}"
        )
    smallest = _meta_model(1, settings.variant).smallest_image_size()
    if size < smallest:
        text = f"variant {settings.variant} needs at least {smallest}"
        raise ValueError(f"--image-size {size}: {text}")
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        text = "the package tensorboard is missing, install it with: pip install"
        raise ValueError(f"--tensorboard: {text} 'fastalex[tensorboard]'")
    if batch % replicas:
        text = f"{replicas} processes share each batch, name a multiple of {replicas}"
        raise ValueError(f"--batch-size {batch}: {text}")


def _check_same_images(
    resume: ResumeState, train: ImageDataset, images: tuple[Contents, ...], allowed: bool
) -> None:
    """Raise unless the images are those that the run started with, or may be others."""
    where, before = f"--data of {resume.folder}", resume.state["contents"]
    if list(train.classes) != resume.state["classes"]:
        raise DataError(f"{where}: the images have other classes than they had")
    parts = zip(("training", "validation"), before, images, strict=True)
    changes = [(part, describe_changes(old, now)) for part, old, now in parts]
    changed = [f"{part} images: {text}" for part, text in changes if text]
    if changed and not allowed:
        raise DataError(
            f"{where}: not what the run started with, {'; '.join(changed)}; put them back, or "
            "go on all the same with --allow-changed-images"
        )
    for line in changed:
        _warn(line)


def _kept_normalization(resume: ResumeState, image: MeanImage | None) -> Normalization:
    """The run's own, with the mean image that the images have now."""
    values, text = resume.state["normalization"], ""
    if "mean_image" not in values:
        return Normalization.from_dict(values)
    if image is None:
        text = "the run subtracts the mean image of a packed set"
    else:
        try:
            return Normalization.from_dict(values, image.pixels)
        except ValueError:
            text = "the packed set has not the mean image that the run started with"
    raise DataError(f"--resume {resume.folder}: {text}; name that set with --data")


def _warn(line: str) -> None:
    if rank() == 0:
        print(f"train: warning: {line}", file=sys.stderr, flush=True)


def _describe(config: RunConfig) -> list[str]:
    settings, world, (train, val) = config.settings, config.world, config.datasets
    split = "whole in one process"
    if world.towers == 2:
        split = "two towers, one per process"
        split += f", {world.replicas} replicas" * (world.replicas > 1)
    elif world.replicas > 1:
        each = settings.batch_size // world.replicas
        split = f"{world.replicas} replicas with {each} images each"
    model = _meta_model(len(config.classes), settings.variant)
    parameters = sum(p.numel() for p in model.parameters())
    steps = -(-len(train) // settings.batch_size)
    epochs = min(settings.epochs, (settings.max_steps or math.inf) / steps)
    most = "" if settings.max_steps is None else f", at most {settings.max_steps} steps"
    recipe = "" if settings.recipe is None else f" (recipe {settings.recipe})"
    normalization = settings.normalization
    if normalization in MEAN_IMAGES and config.normalization.mean_image is None:
        normalization = f"mean (only a packed set has a mean image, for {normalization})"
    rule = MOMENTUM_RULES[settings.momentum_rule]
    if settings.momentum_dtype != "float32":
        rule += f", v in {settings.momentum_dtype}"
    return [
        world.describe(),
        f"net: {settings.variant}, {parameters:,} parameters, dropout {settings.dropout}, {split}",
        f"initialisation: {settings.init} ({INITIALISATIONS[settings.init]}), seed {settings.seed}",
        f"data: {settings.data or 'built-in set'}, {len(config.classes)} classes, {len(train)} "
        f"training and {len(val)} validation images, {settings.image_size} px, "
        f"augmentation {settings.augmentation}, normalization {normalization}",
        f"training: {settings.epochs} epochs of {steps} steps{most}, "
        f"{settings.batch_size} images a step{recipe}",
        f"precision: {settings.precision} ({PRECISIONS[settings.precision]})",
        f"optimizer: SGD, {describe_schedule(settings, epochs)}, momentum {settings.momentum} "
        f"({rule}), weight decay {settings.weight_decay}",
        f"output: {config.folder}",
    ]


def _describe_resume(resume: ResumeState, world: World) -> list[str]:
    if resume.path is None:
        return ["resumed: there is no checkpoint yet, from the first step again"]
    lines = [f"resumed: after step {resume.step}, from {resume.path}"]
    unknown = [n for n in setting_names() if n not in resume.report["settings"]]
    if unknown:
        texts = [describe_setting(n, getattr(resume.settings, n)) for n in unknown]
        lines.append(f"note: started by an older version of fastalex; new here: {', '.join(texts)}")
    changed = resume.differences(world)
    if changed:
        lines.append(
            f"note: {', '.join(changed)}; equal to a run never stopped to rounding, not bit for bit"
        )
    return lines
