"""Train AlexNet: ``python -m fastalex.train --gpus 2``; ``--help`` lists the options."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastalex.common import interrupts
from fastalex.common.command_line import output_may_fail
from fastalex.common.interrupts import Interrupted
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
from fastalex.data.fingerprint import Contents, describe_changes
from fastalex.data.normalization import MEAN_IMAGES
from fastalex.distributed import launch
from fastalex.distributed.launch import TrainingError, WorkerFailed, World
from fastalex.model.alexnet import AlexNet
from fastalex.training import checkpoints, trainer
from fastalex.training.checkpoints import Start
from fastalex.training.config import Settings, describe_setting
from fastalex.training.options import parse_arguments
from fastalex.training.recipes import INITIALISATIONS, MOMENTUM_RULES, NO_RECIPE, RECIPES
from fastalex.training.run_config import Plan
from fastalex.training.run_folder import RunFolder, find_attempt
from fastalex.training.schedule import describe
from fastalex.training.tensorboard import check_tensorboard

_FAILED, _REFUSED = 1, 2
_AGAIN = 75  # EX_TEMPFAIL: what a scheduler is to take for "run it again"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code. 0: trained, or trained before. 1: the run failed. 2: it could not begin, and
        nothing was written. 75: stopped by SIGTERM, SIGUSR1 or SIGHUP; 130: by Ctrl-C. What was
        done is saved, and the same command goes on.
    """
    options = parse_arguments(arguments)
    with output_may_fail(), interrupts.raised():
        try:
            if launch.under_torchrun():
                return _run_under_torchrun(options)
            folder, plan = prepare(options)
            return _run(folder, plan, options) if plan else _finished(folder)
        except (ValueError, OSError) as error:
            return _fail(str(error), _REFUSED)
        except Interrupted as stop:
            line = f"stopped by {stop} before training started, run the same command again"
            return _say_and(line, _exit_code(stop))


def _exit_code(stop: Interrupted) -> int:
    return interrupts.INTERRUPTED if stop.signum == signal.SIGINT else _AGAIN


def _find(options: Mapping[str, Any]) -> tuple[RunFolder, Start | None]:
    """The run's folder, claimed, and where the run in it goes on; None for a new one."""
    resumed, output = options["resume"], options["output"]
    option = "--output" if resumed is None else "--resume"
    if resumed is not None:
        if output is not None:
            raise ValueError("--resume writes to the run's own folder: leave out --output")
        if not RunFolder(resumed).holds_run:
            raise ValueError(f"--resume {resumed}: no run in it, there is no run.json")
    place = resumed or output or find_attempt()
    if place is None:
        recipe = RECIPES.get(options["recipe"], NO_RECIPE)
        variant, seed = options["variant"] or recipe.variant, options["seed"] or 0
        return RunFolder.create(variant, seed), None
    folder = RunFolder.claim(place, option)
    if not folder.holds_run:
        return folder, None
    try:
        start, damaged = checkpoints.find(place, option)
    except BaseException:
        folder.release()
        raise
    for line in damaged:
        _say_and(f"warning: {line}; the checkpoint before it is used", 0)
    return folder, start


def _finished(folder: RunFolder) -> int:
    """Say that there is nothing to go on with; the last process may have died before it could."""
    step = checkpoints.newest_step(folder)  # None without checkpoints
    print(f"{folder.path} is finished" + (f": all of its {step} steps are done" if step else ""))
    line = _end(folder, "finished")
    if line:
        return _fail(line, _FAILED)
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


def prepare(options: Mapping[str, Any]) -> tuple[RunFolder, Plan | None]:
    """Check everything a user can get wrong, claim the run's folder and say what was chosen.

    Returns:
        The folder, claimed, and the plan; None where the run in it is finished.

    Raises:
        ValueError: for what is wrong; nothing was written.
    """
    folder, start = _find(options)
    try:
        return folder, _prepare(options, folder, start)
    except BaseException as error:
        if folder.running:
            _end(folder, "interrupted" if isinstance(error, Interrupted) else "failed")
        folder.release()
        raise


def _prepare(options: Mapping[str, Any], folder: RunFolder, start: Start | None) -> Plan | None:
    world = _find_world(options, start)
    if start is None:
        settings = Settings.choose(options, world.device_type)
    else:
        settings = start.choose(options, named=options["resume"] is not None)
        start = replace(start, settings=settings)
        if start.finished:
            checkpoints.drop(folder, start.path, settings.keep_checkpoints)
            return None
    _check(settings, world)
    sources = train, val = open_sources(settings.data, settings.seed, settings.image_size)
    color_noise(train, settings.color_noise)  # raises what can't be
    side = decode_size(settings.image_size)
    image = mean_image(train, settings.normalization, side)
    images = train.contents(), val.contents()
    if start is None or start.path is None:
        scale = Normalization.measure(train, side).scaled(settings.normalization, image)
    else:
        _check_same_images(start, train, images, options["allow_changed_images"])
        scale = _kept_normalization(start, image)
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
        images=images,
    )
    if start is None:
        folder.begin(options, settings.to_dict(), vars(world))
    else:
        checkpoints.drop(folder, start.path, settings.keep_checkpoints)
        folder.resume(options, settings.to_dict(), vars(world), start.step)
    model = _without_memory(len(plan.classes), settings.variant)
    for line in _describe(plan, sum(p.numel() for p in model.parameters()), train, val):
        print(line, flush=True)
    return plan


def _without_memory(classes: int, variant: str) -> AlexNet:
    """A net that tells its sizes and holds no numbers."""
    with torch.device("meta"):
        return AlexNet(classes, variant=variant)


def _check(settings: Settings, world: World) -> None:
    """Raise unless the settings go with each other and with the world."""
    if settings.augmentation == "resized" and settings.normalization in MEAN_IMAGES:
        raise ValueError(
            f"--augmentation resized: parts of any size have no mean image; leave it out or use "
            f"another --normalization than {settings.normalization}"
        )
    smallest = _without_memory(1, settings.variant).smallest_image_size()
    if settings.image_size < smallest:
        raise ValueError(
            f"--image-size {settings.image_size}: variant {settings.variant} needs at least "
            f"{smallest}"
        )
    if settings.tensorboard:
        check_tensorboard()
    if settings.batch_size % world.replicas:
        raise ValueError(
            f"--batch-size {settings.batch_size}: {world.replicas} processes share each batch, "
            f"name a multiple of {world.replicas}"
        )


def _check_same_images(
    start: Start, train: ImageSource, images: tuple[Contents, ...], allowed: bool
) -> None:
    """Raise unless the images are those that the run started with, or may be others."""
    where, before = f"--data of {start.folder}", start.state.get("contents")
    if list(train.classes) != start.state["classes"]:
        raise DataError(f"{where}: the images have other classes than they had")
    if before:
        parts = zip(("training", "validation"), before, images, strict=True)
        changes = [(part, describe_changes(old, now)) for part, old, now in parts]
        changed = [f"{part} images: {text}" for part, text in changes if text]
    else:  # an older version's
        counts = [sum(count for count, _ in part.values()) for part in images]
        changed = [f"{counts} training and validation images, and there were {before}"]
        changed = changed if counts != start.state["images"] else []
    if changed and not allowed:
        raise DataError(
            f"{where}: not what the run started with, {'; '.join(changed)}; put them back, or "
            "go on all the same with --allow-changed-images"
        )
    for line in changed:
        print(f"train: warning: {line}", file=sys.stderr)


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
            f"--resume {start.folder}: the packed set has not the mean image that the run started "
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
    if start.unknown:
        texts = [describe_setting(n, getattr(start.settings, n)) for n in start.unknown]
        lines.append(f"note: started by an older version of fastalex; new here: {', '.join(texts)}")
    changed = start.differences(world)
    if changed:
        lines.append(
            f"note: {', '.join(changed)}; equal to a run never stopped to rounding, not bit for bit"
        )
    return lines


def _run(folder: RunFolder, plan: Plan, options: Mapping[str, Any]) -> int:
    """Train in as many processes as planned, and note and say how it ended."""
    status, line, code = "failed", "", _FAILED
    try:
        launch.run(plan.world, trainer.train, plan)
        status, code = "finished", 0
    except Interrupted as stop:
        status, code = "interrupted", _exit_code(stop)
        line = _stopped_by(stop, folder, options)
    except (TrainingError, WorkerFailed) as error:
        if isinstance(error, WorkerFailed) and error.traceback:
            print(error.traceback, file=sys.stderr)
        way_on = _way_on(folder) if isinstance(error, WorkerFailed) else ""
        line = f"error: {_stopped(error, plan.world)}; {folder.kept()}{way_on}"
    finally:
        unwritten = _end(folder, status)
    if code == 0 and unwritten:
        line, code = unwritten, _FAILED
    if code == 0:
        _say_where(folder)
        return 0
    _clear_bar(plan.world)
    return _say_and(line, code)


def _end(folder: RunFolder, status: str) -> str:
    """Note how the run ended and let go of its folder; a line where that can't be written."""
    with interrupts.blocked():
        try:
            folder.end(status)
        except (OSError, ValueError) as error:
            return f"error: {folder.path}: run.json can't say that the run is {status}: {error}"
        finally:
            folder.release()
    return ""


def _stopped_by(stop: Interrupted, folder: RunFolder, options: Mapping[str, Any]) -> str:
    step = checkpoints.newest_step(folder)
    done = "before its first checkpoint" if step is None else f"after step {step}"
    named = options["output"] or options["resume"] or launch.under_torchrun()
    again = "run the same command again" if named else f"use --resume {folder.path}"
    return f"stopped by {stop} {done}; {again} to go on"


def _stopped(error: Exception, world: World) -> str:
    if isinstance(error, WorkerFailed):
        others = "the other process was" if world.processes == 2 else "the others were"
        return f"{error}, {others} stopped"
    return str(error)


def _way_on(folder: RunFolder) -> str:
    """How to go on with a run that was stopped from outside."""
    step = checkpoints.newest_step(folder)
    return "" if step is None else f"; --resume {folder.path} goes on after step {step}"


def _run_under_torchrun(options: Mapping[str, Any]) -> int:
    """Be one process of the world that torchrun started."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launch.die_with_parent(os.getppid())
    folder, plan, code = None, None, _FAILED
    status, line, unwritten = "failed", "", ""

    def give_up(line: str) -> None:
        unwritten = "" if folder is None else _end(folder, status)
        _say_of_rank(line, folder, unwritten)

    launch.give_up = give_up
    try:
        folder, plan, code = _agree(options)
        if plan is None:
            return code
        with interrupts.noticed():
            launch.in_process(plan.world, trainer.train, plan)
        status = "finished"
    except Interrupted as stop:
        if plan is None or folder is None:
            raise
        status, code = "interrupted", _exit_code(stop)
        _say_and(_stopped_by(stop, folder, options), code)
    except (TrainingError, RuntimeError) as error:
        if not isinstance(error, TrainingError) and not launch.is_lost_peer(error):
            raise
        line, code = str(error), _FAILED
    finally:
        if folder is not None and plan is not None:
            unwritten = _end(folder, status)
    if line:
        _say_of_rank(line, folder, unwritten)
    elif unwritten:
        code = _fail(unwritten, code or _FAILED)
    elif folder is not None and code == 0:
        _say_where(folder)
    return code


def _say_of_rank(line: str, folder: RunFolder | None, unwritten: str) -> None:
    """Say why a process of torchrun's ends; rank 0 alone has the run's folder."""
    kept = "" if folder is None else f"; {folder.kept()}{_way_on(folder)}"
    text = f"train: error: rank {launch.rank()}: {line}{kept}"
    print("\n".join(filter(None, (text, unwritten))), file=sys.stderr, flush=True)


def _agree(options: Mapping[str, Any]) -> tuple[RunFolder | None, Plan | None, int]:
    """Rank 0's folder, the plan, and an exit code where there is none.

    Rank 0 makes the plan, which may take it hours, before any collective waits for it. There is no
    plan where the run is finished, or where a process can't take part, which says why.
    """
    rank, size = launch.rank(), int(os.environ["WORLD_SIZE"])
    folder, plan, code, refusal, store = None, None, 0, "", None
    try:
        world = _find_world(options, None)
        store = launch.meet(size) if size > 1 else None
        if rank == 0:
            folder, plan = prepare(options)
            code = 0 if plan else _finished(folder)
        else:
            plan, code = _receive_plan(store, world)
    except (ValueError, OSError) as error:
        code, refusal = _REFUSED, str(error)
        name = f"rank {rank}: " if rank else ""
        print(f"train: error: {name}{refusal}", file=sys.stderr, flush=True)
    if store is None and size > 1 and "MASTER_ADDR" in os.environ:
        store = launch.meet(size)  # to tell the others
    if store is None:
        return folder, plan, code
    if rank == 0:
        store.set("plan", json.dumps([plan and plan.to_dict(), code]))
    store.set(f"refusal {rank}", refusal)
    if rank and plan is None:
        return None, None, code
    waiting = "waits for the other processes"
    refused = [i for i in range(size) if launch.receive(store, f"refusal {i}", waiting)]
    if refused and not refusal:
        if folder is not None:
            _say_and(f"error: rank {refused[0]} can't take part, it says why", _REFUSED)
            _end(folder, "failed")
        return folder, None, _REFUSED
    return folder, plan, code


def _receive_plan(store: Any, world: World) -> tuple[Plan | None, int]:
    """What rank 0 decided: a plan, or an exit code.

    Raises:
        ValueError: where this process can't follow the plan.
    """
    text = launch.receive(store, "plan", "waits for rank 0, which prepares the data")
    values, code = json.loads(text)
    plan = Plan.from_dict(values) if values else None
    if plan is not None and plan.world.device_type != world.device_type:
        raise ValueError(f"runs on {world.device_type}, rank 0 on {plan.world.device_type}")
    return plan, code


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
