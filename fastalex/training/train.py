"""Train AlexNet: ``python -m fastalex.train --gpus 2``; ``--help`` lists the options."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from fastalex.common import interrupts
from fastalex.common.command_line import REFUSED, output_may_fail
from fastalex.common.interrupts import INTERRUPTED, Interrupted
from fastalex.distributed import launch
from fastalex.distributed.launch import PeerLost, TrainingError
from fastalex.distributed.world import find_world, rank, under_launcher, world_size
from fastalex.training import checkpoints, trainer
from fastalex.training.config import Settings
from fastalex.training.options import Raising, as_arguments, parse_arguments
from fastalex.training.prepare import RunConfig, end, new_place, prepare
from fastalex.training.run_folder import RunFolder, launch_id

_FAILED = 1
_AGAIN = 75  # EX_TEMPFAIL: what a scheduler is to take for "run it again"
_EXPECTED = (Interrupted, TrainingError, ValueError, OSError)


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
            processes = _processes(options)
            if processes > 1 and not under_launcher():
                return launch.start(_command(arguments), processes)
            launch.greet_launcher()
            if processes > 1:
                _be_one_of_several(options)
            _run(options)
        except _EXPECTED as error:
            return _say(error)
    return 0


def _be_one_of_several(options: Mapping[str, Any]) -> NoReturn:
    """Run, and end this process: torch's threads that still run would abort an orderly exit."""
    code = 0
    try:
        _run(options)
    except _EXPECTED as error:
        code = _say(error)
    except Exception:
        traceback.print_exc()
        code = _FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fit(**options: Any) -> Path:
    """Train what ``python -m fastalex.train`` trains; ``gpus=2`` by that command.

    Args:
        options: of the command, as in ``fit(data="photos", epochs=3, fused_update=False)``.

    Returns:
        The run's folder, which holds model.safetensors and metrics.jsonl.

    Raises:
        ValueError: for a wrong option; nothing was written.
        TrainingError: where the run failed; its folder keeps what was done.
        Interrupted: after a signal; the same call goes on.
    """
    given = parse_arguments(as_arguments(options), Raising)
    processes = _processes(given)
    if processes == 1:
        folder = _run(given)
        assert folder is not None
        return folder.path
    place = given["resume"] or given["output"] or new_place(given)
    if given["resume"] is None:
        options["output"] = place
    code = launch.start(_command(as_arguments(options)), processes)
    if code in (_AGAIN, INTERRUPTED):
        raise Interrupted(signal.SIGINT if code == INTERRUPTED else signal.SIGTERM)
    if code:
        kind = ValueError if code == REFUSED else TrainingError
        raise kind(f"{place}: training ended with code {code}, for the reason on stderr")
    return Path(place)


def _processes(options: Mapping[str, Any]) -> int:
    """How many processes the run is to have, or a launcher started."""
    place, gpus = options["resume"] or options["output"], options["gpus"]
    if gpus is None and place is not None and not under_launcher():
        gpus = RunFolder(place).processes()
    return find_world(gpus, Settings.variant).processes


def _command(arguments: Sequence[str] | None) -> list[str]:
    """The command line of this process, or one with ``arguments``."""
    if arguments is None:
        return [sys.executable, *sys.orig_argv[1:]]
    return [sys.executable, "-m", "fastalex.train", *arguments]


def _run(options: Mapping[str, Any]) -> RunFolder | None:
    """Be a process of a run; of several the first has the run's folder."""
    try:
        store = launch.rendezvous()
        folder, config = _agree(options, store)
    except RuntimeError as error:
        if launch.is_lost_peer(error):
            raise TrainingError(str(error)) from error
        raise
    if config is not None:
        _train(options, config, folder, store)
    elif folder is not None:
        step = checkpoints.newest_step(folder)  # None without checkpoints
        done = f": all of its {step} steps are done" if step else ""
        print(f"{folder.path} is finished{done}")
        end(folder, "finished")  # the last process may have died before it could
    if folder is not None:
        print(f"weights: {folder.weights}, metrics: {folder.metrics}", flush=True)
    return folder


def _agree(options: Mapping[str, Any], store: Any) -> tuple[RunFolder | None, RunConfig | None]:
    """Rank 0's folder, claimed, and the run's configuration; None where the run is finished.

    Rank 0 prepares the run, which may take it hours, before any collective waits for it.
    """
    folder, config, refusal = None, None, None
    try:
        if rank() == 0:
            folder, config = prepare(options)
        elif text := launch.receive(store, "config", "waits for rank 0, which prepares the data"):
            config = RunConfig.from_json(text)
            here, there = find_world(None, Settings.variant).device_type, config.world.device_type
            if here != there:
                raise ValueError(f"runs on {here}, rank 0 on {there}")
    except (ValueError, OSError) as error:
        refusal = error
    if store is not None:
        if rank() == 0:
            store.set("config", config.to_json() if config else "")
        store.set(f"refusal {rank()}", "" if refusal is None else repr(refusal))
        refusals = [
            launch.receive(store, f"refusal {number}", "waits for the other processes")
            for number in range(world_size())
        ]
        if any(refusals) and refusal is None:
            number = next(i for i, text in enumerate(refusals) if text)
            refusal = ValueError(f"rank {number} can't take part, it says why")
    if refusal is not None:
        if folder is not None:
            end(folder, "failed")
        raise refusal
    return folder, config


def _train(
    options: Mapping[str, Any], config: RunConfig, folder: RunFolder | None, store: Any
) -> None:
    """Train; rank 0 notes in ``folder`` how it ended."""

    def on_stuck(line: str) -> None:
        with contextlib.suppress(TrainingError):
            end(folder, "failed")
        if line:
            _say(TrainingError(line + _kept(folder, goes_on=True)))

    status = "failed"
    try:
        with interrupts.noticed():
            launch.join_world(config.world, store, partial(trainer.train, config), on_stuck)
        status = "finished"
    except Interrupted as stop:
        status = "interrupted"
        raise Interrupted(stop.signum, _way_on(folder, options)) from None
    except TrainingError as error:
        text = f"{error}{_kept(folder, goes_on=isinstance(error, PeerLost))}"
        raise TrainingError(text, error.everywhere) from error
    finally:
        with contextlib.suppress(*() if status == "finished" else (TrainingError,)):
            end(folder, status)


def _kept(folder: RunFolder | None, goes_on: bool) -> str:
    """What an ended run keeps and, where it can, how to go on with it; for a message."""
    if folder is None:
        return ""
    step = checkpoints.newest_step(folder) if goes_on else None
    way = "" if step is None else f"; --resume {folder.path} goes on after step {step}"
    return f"; {folder.kept()}{way}"


def _way_on(folder: RunFolder | None, options: Mapping[str, Any]) -> str:
    """When a run was stopped, and how to go on with it."""
    if folder is None:
        return ""
    step = checkpoints.newest_step(folder)
    done = " before its first checkpoint" if step is None else f" after step {step}"
    named = options["output"] or options["resume"] or launch_id()
    again = "run the same command again" if named else f"use --resume {folder.path}"
    return f"{done}; {again} to go on"


def _say(error: BaseException) -> int:
    """Print the line of an error, once for all processes that have it; the exit code."""
    who = f"rank {rank()}: " if world_size() > 1 else ""
    line, code, speaks = f"error: {who}{error}", _FAILED, True
    if isinstance(error, Interrupted):
        line = f"stopped by {error}"
        if not error.note:
            line += " before training started; run the same command again"
        code = INTERRUPTED if error.signum == signal.SIGINT else _AGAIN
        speaks = rank() == 0
    elif isinstance(error, TrainingError):
        if error.everywhere:
            line, speaks = f"error: {error}", rank() == 0
    else:  # a machine's, not a process's
        line, code = f"error: {who if rank() else ''}{error}", REFUSED
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    if speaks:
        print(f"train: {line}", file=sys.stderr, flush=True)
    return code
