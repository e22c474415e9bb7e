"""Train AlexNet: ``python -m fastalex.train --gpus 2``; ``--help`` lists the options."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from fastalex import engine, interrupts, launch, resume
from fastalex.config import Settings
from fastalex.curves import check_tensorboard
from fastalex.data import (
    DataError,
    ImageSource,
    MeanImage,
    Normalization,
    color_noise,
    decode_size,
    mean_image,
    open_sources,
)
from fastalex.data.normalization import MEAN_IMAGES
from fastalex.launch import Interrupted, TrainingError, WorkerFailed, World
from fastalex.model import AlexNet
from fastalex.options import parse_arguments
from fastalex.plan import Plan
from fastalex.recipes import INITIALISATIONS, MOMENTUM_RULES, NO_RECIPE, RECIPES
from fastalex.resume import Start
from fastalex.run_folder import RunFolder, check_idle, check_output
from fastalex.schedule import describe

_FAILED, _REFUSED = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code. 0: trained. 1: the run failed. 2: it could not begin, and nothing was
        written. 128 and the signal's number, 130 for Ctrl-C: interrupted.
    """
    options = parse_arguments(arguments)
    try:
        interrupts.raise_again()
        start = _find_start(options)
        if start is not None and start.finished:
            return _finished(start)
        world = _find_world(options, start)
        if launch.under_torchrun():
            return _run_under_torchrun(options, world, start)
        plan = prepare(options, world, start)
    except (ValueError, OSError) as error:
        return _fail(str(error), _REFUSED)
    except KeyboardInterrupt:
        return _say_and("interrupted before training began, nothing was written", 130)
    return _run(plan)


def _find_start(options: Mapping[str, Any]) -> Start | None:
    """Where the run of --resume goes on; says which of its checkpoints are damaged."""
    if options["resume"] is None:
        return None
    start, damaged = resume.find(options["resume"])
    for line in damaged:
        _say_and(f"warning: {line}; the checkpoint before it is used", 0)
    return start


def _finished(start: Start) -> int:
    """Say that there is nothing to go on with; the last process may have died before it could."""
    folder = RunFolder(start.folder)
    if launch.rank() == 0:
        print(f"{start.folder} is finished: all of its {start.step} steps are done")
        folder.end("finished")
        _say_where(folder)
    return 0


def _find_world(options: Mapping[str, Any], start: Start | None) -> World:
    gpus, threads, variant = (options[name] for name in ("gpus", "threads", "variant"))
    if start is None:
        recipe = RECIPES.get(options["recipe"], NO_RECIPE)
        return launch.find_world(gpus, variant or recipe.variant, threads)
    if gpus is None and not launch.under_torchrun():
        gpus = start.world.processes
    # Sums are taken in another order by another number of threads.
    same = gpus in (None, start.world.processes)
    threads = threads or (start.world.threads if same else None)
    return launch.find_world(gpus, start.settings.variant, threads)


def prepare(options: Mapping[str, Any], world: World, start: Start | None = None) -> Plan:
    """Check everything a user can get wrong, then make the run's folder and say what was chosen.

    Raises:
        ValueError: for what is wrong; nothing was written.
    """
    settings = _choose(options, world, start)
    sources = train, val = open_sources(settings.data, settings.seed, settings.image_size)
    model = AlexNet(len(train.classes), variant=settings.variant)
    smallest = model.smallest_image_size()
    if settings.image_size < smallest:
        raise ValueError(
            f"--image-size {settings.image_size}: variant {settings.variant} needs at least "
            f"{smallest}"
        )
    color_noise(train, settings.color_noise)  # raises what can't be
    side = decode_size(settings.image_size)
    image = mean_image(train, settings.normalization, side)
    if start is None or start.path is None:
        scale = Normalization.measure(train, side).scaled(settings.normalization, image)
    else:
        _check_same_images(start, train, val)
        scale = _kept_normalization(start, image)
    if start is None:
        folder = RunFolder.create(options["output"], settings.variant, settings.seed)
        folder.begin(options, settings.to_dict(), vars(world))
    else:
        folder = RunFolder(start.folder)
        folder.resume(options, vars(world), start.step)
    plan = Plan(
        settings,
        world,
        folder.path,
        list(train.classes),
        scale,
        unreadable=[bad for source in sources for bad in getattr(source, "unreadable", [])],
        # Another process opens its own: what is kept in memory would be sent along.
        sources=sources if world.processes == 1 else None,
        start=start,
    )
    parameters = sum(p.numel() for p in model.parameters())
    for line in _describe(plan, parameters, train, val):
        print(line, flush=True)
    return plan


def _choose(options: Mapping[str, Any], world: World, start: Start | None) -> Settings:
    """The settings of the run, checked against each other and against the world."""
    if start is None:
        settings = Settings.choose(options, world.device_type)
        if options["output"] is not None:
            check_output(options["output"])
    else:
        if options["output"] is not None:
            raise ValueError("--resume writes to the run's own folder: leave out --output")
        settings = start.settings.resumed(options)
        check_idle(RunFolder(start.folder))
    if settings.augmentation == "resized" and settings.normalization in MEAN_IMAGES:
        raise ValueError(
            f"--augmentation resized: parts of any size have no mean image; leave it out or use "
            f"another --normalization than {settings.normalization}"
        )
    if settings.tensorboard:
        check_tensorboard()
    if settings.batch_size % world.replicas:
        raise ValueError(
            f"--batch-size {settings.batch_size}: {world.replicas} processes share each batch, "
            f"name a multiple of {world.replicas}"
        )
    return settings


def _check_same_images(start: Start, train: ImageSource, val: ImageSource) -> None:
    """Raise unless the images are those that the run began with, as far as counting tells."""
    before, now = start.state["images"], [len(train), len(val)]
    if list(train.classes) != start.state["classes"]:
        raise DataError(f"--resume {start.folder}: the images have other classes than they had")
    if before != now:
        raise DataError(
            f"--resume {start.folder}: {now[0]} training and {now[1]} validation images, "
            f"and there were {before[0]} and {before[1]}"
        )


def _kept_normalization(start: Start, image: MeanImage | None) -> Normalization:
    """The run's own, with the mean image that the images have now."""
    values = start.state["normalization"]
    if "mean_image" not in values:
        return Normalization.from_dict(values)
    if image is None:
        raise DataError(
            f"--resume {start.folder}: the run subtracts the mean image of a packed set; "
            "name that set with --data"
        )
    try:
        return Normalization.from_dict(values, image.pixels)
    except ValueError as error:
        raise DataError(
            f"--resume {start.folder}: the packed set has not the mean image that the run began "
            "with; name that set with --data"
        ) from error


def _describe(plan: Plan, parameters: int, train: ImageSource, val: ImageSource) -> list[str]:
    settings, world = plan.settings, plan.world
    if world.towers == 2:
        split = "two towers, one per process"
        if world.replicas > 1:
            split += f", {world.replicas} replicas"
    elif world.replicas > 1:
        split = (
            f"{world.replicas} replicas with {settings.batch_size // world.replicas} images each"
        )
    else:
        split = "whole in one process"
    steps = -(-len(train) // settings.batch_size)
    most_steps = settings.max_steps or math.inf
    epochs = min(settings.epochs, most_steps / steps)
    most = "" if settings.max_steps is None else f", at most {settings.max_steps} steps"
    recipe = "" if settings.recipe is None else f" (recipe {settings.recipe})"
    lines = [
        world.describe(),
        f"net: {settings.variant}, {parameters:,} parameters, dropout {settings.dropout}, {split}",
        f"initialisation: {settings.init} ({INITIALISATIONS[settings.init]}), seed {settings.seed}",
        f"data: {settings.data or 'built-in set'}, {len(plan.classes)} classes, {len(train)} "
        f"training and {len(val)} validation images, {settings.image_size} px, "
        f"augmentation {settings.augmentation}, {_describe_normalization(plan)}",
        f"training: {settings.epochs} epochs of {steps} steps{most}, "
        f"{settings.batch_size} images a step, {settings.precision}{recipe}",
        f"optimizer: SGD, {describe(settings, epochs)}, momentum {settings.momentum} "
        f"({MOMENTUM_RULES[settings.momentum_rule]}), weight decay {settings.weight_decay}",
        f"output: {plan.folder}",
    ]
    return lines if plan.start is None else lines + _describe_start(plan.start, world)


def _describe_normalization(plan: Plan) -> str:
    kind = plan.settings.normalization
    if kind in MEAN_IMAGES and plan.normalization.mean_image is None:
        return f"normalization mean (only a packed set has a mean image, for {kind})"
    return f"normalization {kind}"


def _describe_start(start: Start, world: World) -> list[str]:
    if start.path is None:
        return ["resumed: there is no checkpoint yet, from the first step again"]
    lines = [f"resumed: after step {start.step}, from {start.path}"]
    changed = start.differences(world)
    if changed:
        lines.append(
            f"note: {', '.join(changed)}; equal to a run never stopped to rounding, not bit for bit"
        )
    return lines


def _run(plan: Plan) -> int:
    """Train in as many processes as planned, and note and say how it ended."""
    folder = RunFolder(plan.folder)
    status = "failed"
    try:
        launch.run(plan.world, engine.train, plan)
        status = "finished"
    except Interrupted as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second Ctrl-C
        status = "interrupted"
        _clear_bar(plan.world)
        return _say_and(
            f"interrupted by {stop}; {folder.kept()}{_way_on(folder)}", 128 + stop.signum
        )
    except (TrainingError, WorkerFailed) as error:
        _clear_bar(plan.world)
        if isinstance(error, WorkerFailed) and error.traceback:
            print(error.traceback, file=sys.stderr)
        way_on = _way_on(folder) if isinstance(error, WorkerFailed) else ""
        return _fail(f"{_stopped(error, plan.world)}; {folder.kept()}{way_on}", _FAILED)
    finally:
        folder.end(status)
    _say_where(folder)
    return 0


def _stopped(error: Exception, world: World) -> str:
    if isinstance(error, WorkerFailed):
        others = "the other process was" if world.processes == 2 else "the others were"
        return f"{error}, {others} stopped"
    return str(error)


def _way_on(folder: RunFolder) -> str:
    """How to go on with a run that was stopped from outside."""
    step = resume.last_step(folder)
    return "" if step is None else f"; --resume {folder.path} goes on after step {step}"


def _run_under_torchrun(options: Mapping[str, Any], world: World, start: Start | None) -> int:
    """Be one process of the world that torchrun started."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launch.die_with_parent(os.getppid())
    try:
        return launch.in_process(world, _member, options, world, start)
    except TrainingError as error:
        # Each process for itself: the others may have stopped without a word of their own.
        line = f"train: error: rank {launch.rank()}: {error}"
        print(line, file=sys.stderr, flush=True)
        return _FAILED
    except KeyboardInterrupt:
        return 130


def _member(options: Mapping[str, Any], world: World, start: Start | None) -> int:
    decided: list[Plan | None] = [None]
    if launch.rank() == 0:
        try:
            decided = [prepare(options, world, start)]
        except (ValueError, OSError) as error:
            _fail(str(error), _REFUSED)
    if world.processes > 1:
        dist.broadcast_object_list(decided)
    plan = decided[0]
    if plan is None:
        return _REFUSED
    folder = RunFolder(plan.folder)
    status = "failed"
    try:
        engine.train(plan)
        status = "finished"
    finally:
        if launch.rank() == 0:
            folder.end(status)
    if launch.rank() == 0:
        _say_where(folder)
    return 0


def _say_where(folder: RunFolder) -> None:
    print(f"weights: {folder.weights}, metrics: {folder.metrics}", flush=True)


def _clear_bar(world: World) -> None:
    """Take away the progress bar of a process that could not do it itself."""
    if world.processes > 1 and sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)


def _fail(message: str, code: int) -> int:
    return _say_and(f"error: {message}", code)


def _say_and(message: str, code: int) -> int:
    if launch.rank() == 0:
        print(f"train: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
