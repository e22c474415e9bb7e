"""Train AlexNet: ``python -m fastalex.train --gpus 2``; ``--help`` lists the options."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from fastalex import engine, launch
from fastalex.config import INITIALISATIONS, Settings, parse_arguments
from fastalex.data import ImageSource, Normalization, decode_size, open_sources
from fastalex.launch import Interrupted, TrainingError, WorkerFailed, World
from fastalex.model import AlexNet
from fastalex.run_folder import RunFolder, check_output

_FAILED, _REFUSED = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code. 0: trained. 1: the run failed. 2: it could not begin, and nothing was
        written. 128 and the signal's number, 130 for Ctrl-C: interrupted.
    """
    options = parse_arguments(arguments)
    try:
        world = launch.find_world(options["gpus"], options["variant"], options["threads"])
        if launch.under_torchrun():
            return _run_under_torchrun(options, world)
        plan = prepare(options, world)
    except (ValueError, OSError) as error:
        return _fail(str(error), _REFUSED)
    except KeyboardInterrupt:
        return _say_and("interrupted before training began, nothing was written", 130)
    return _run(plan)


def prepare(options: Mapping[str, Any], world: World) -> engine.Plan:
    """Check everything a user can get wrong, then make the run's folder and say what was chosen.

    Raises:
        ValueError: for what is wrong; nothing was written.
    """
    settings = Settings.choose(options, world.device_type)
    if options["output"] is not None:
        check_output(options["output"])
    if settings.batch_size % world.replicas:
        raise ValueError(
            f"--batch-size {settings.batch_size}: {world.replicas} processes share each batch, "
            f"name a multiple of {world.replicas}"
        )
    sources = train, val = open_sources(settings.data, settings.seed, settings.image_size)
    model = AlexNet(len(train.classes), variant=settings.variant)
    smallest = model.smallest_image_size()
    if settings.image_size < smallest:
        raise ValueError(
            f"--image-size {settings.image_size}: variant {settings.variant} needs at least "
            f"{smallest}"
        )
    normalization = Normalization.measure(train, decode_size(settings.image_size))
    folder = RunFolder.create(options["output"], settings.variant, settings.seed)
    plan = engine.Plan(
        settings,
        world,
        folder.path,
        list(train.classes),
        normalization,
        unreadable=[bad for source in sources for bad in getattr(source, "unreadable", [])],
        # Another process opens its own: what is kept in memory would be sent along.
        sources=sources if world.processes == 1 else None,
    )
    folder.begin(options, {**vars(settings), **vars(world)})
    parameters = sum(p.numel() for p in model.parameters())
    for line in _describe(plan, parameters, train, val):
        print(line, flush=True)
    return plan


def _describe(
    plan: engine.Plan, parameters: int, train: ImageSource, val: ImageSource
) -> list[str]:
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
    drop = f" (a tenth after {settings.lr_drop:.0%} of the steps)" if settings.lr_drop < 1 else ""
    most = "" if settings.max_steps is None else f", at most {settings.max_steps} steps"
    return [
        world.describe(),
        f"net: {settings.variant}, {parameters:,} parameters, dropout {settings.dropout}, {split}",
        f"initialisation: {settings.init} ({INITIALISATIONS[settings.init]}), seed {settings.seed}",
        f"data: {settings.data or 'built-in set'}, {len(plan.classes)} classes, {len(train)} "
        f"training and {len(val)} validation images, {settings.image_size} px, unit variance",
        f"training: {settings.epochs} epochs of {steps} steps{most}, "
        f"{settings.batch_size} images a step",
        f"optimizer: SGD, lr {settings.lr}{drop}, momentum {settings.momentum}, "
        f"weight decay {settings.weight_decay}",
        f"output: {plan.folder}",
    ]


def _run(plan: engine.Plan) -> int:
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
        return _say_and(f"interrupted by {stop}; {folder.kept()}", 128 + stop.signum)
    except (TrainingError, WorkerFailed) as error:
        _clear_bar(plan.world)
        if isinstance(error, WorkerFailed) and error.traceback:
            print(error.traceback, file=sys.stderr)
        return _fail(f"{_stopped(error, plan.world)}; {folder.kept()}", _FAILED)
    finally:
        folder.end(status)
    _say_where(folder)
    return 0


def _stopped(error: Exception, world: World) -> str:
    if isinstance(error, WorkerFailed):
        others = "the other process was" if world.processes == 2 else "the others were"
        return f"{error}, {others} stopped"
    return str(error)


def _run_under_torchrun(options: Mapping[str, Any], world: World) -> int:
    """Be one process of the world that torchrun started."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launch.die_with_parent(os.getppid())
    try:
        return launch.in_process(world, _member, options, world)
    except TrainingError as error:
        # Each process for itself: the others may have stopped without a word of their own.
        line = f"train: error: rank {launch.rank()}: {error}"
        print(line, file=sys.stderr, flush=True)
        return _FAILED
    except KeyboardInterrupt:
        return 130


def _member(options: Mapping[str, Any], world: World) -> int:
    decided: list[engine.Plan | None] = [None]
    if launch.rank() == 0:
        try:
            decided = [prepare(options, world)]
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
