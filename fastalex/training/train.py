"""Train AlexNet: ``python -m fastalex.train --gpus 2``; ``--help`` lists the options."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastalex.common import interrupts
from fastalex.common.command_line import REFUSED, output_may_fail
from fastalex.common.interrupts import INTERRUPTED, Interrupted
from fastalex.distributed import launch
from fastalex.distributed.launch import PeerLost, TrainingError, WorkerFailed
from fastalex.distributed.world import rank, under_torchrun
from fastalex.training import checkpoints, fine_tuning, trainer
from fastalex.training.options import Raising, as_arguments, parse_arguments
from fastalex.training.prepare import choose_world, end, prepare
from fastalex.training.run_config import RunConfig
from fastalex.training.run_folder import RunFolder

_FAILED = 1
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
            if under_torchrun():
                return _run_under_torchrun(options)
            options = fine_tuning.with_file(options)
            folder, config = prepare(options)
            if config is None:
                return _finished(folder)
            return _run(
                lambda: launch.run(config.world, trainer.train, config), config, folder, options
            )
        except (ValueError, OSError) as error:
            return _say(f"error: {error}", REFUSED)
        except Interrupted as stop:
            line = f"stopped by {stop} before training started, run the same command again"
            return _say(line, _exit_code(stop))


def fit(**options: Any) -> Path:
    """Train what ``python -m fastalex.train`` trains, from Python.

    Several processes import the main module again: a script that asks for ``gpus=2`` calls this
    under ``if __name__ == "__main__"``.

    Args:
        options: of the command, as in ``fit(data="photos", epochs=3, fused_update=False)``.

    Returns:
        The run's folder, which holds model.safetensors and metrics.jsonl.

    Raises:
        ValueError: for a wrong option; nothing was written.
        TrainingError, WorkerFailed: where the run failed; its folder keeps what was done.
        Interrupted: after a signal; the same call goes on.
    """
    given = fine_tuning.with_file(parse_arguments(as_arguments(options), Raising))
    folder, config = prepare(given)
    status = "failed" if config else "finished"
    try:
        if config is not None:
            launch.run(config.world, trainer.train, config)
            status = "finished"
    except Interrupted:
        status = "interrupted"
        raise
    finally:
        unwritten = end(folder, status)
    if unwritten:
        raise TrainingError(unwritten)
    return folder.path


def _exit_code(stop: Interrupted) -> int:
    return INTERRUPTED if stop.signum == signal.SIGINT else _AGAIN


def _finished(folder: RunFolder) -> int:
    """Say that there is nothing to go on with; the last process may have died before it could."""
    step = checkpoints.newest_step(folder)  # None without checkpoints
    print(f"{folder.path} is finished" + (f": all of its {step} steps are done" if step else ""))
    line = end(folder, "finished")
    if line:
        return _say(line, _FAILED)
    _say_where(folder)
    return 0


def _run(
    train: Callable[[], None],
    config: RunConfig,
    folder: RunFolder | None,
    options: Mapping[str, Any],
) -> int:
    """Call ``train``; note and say how it ended. Of torchrun's processes only rank 0 has a folder.

    Returns:
        The exit code.
    """
    status, line, code = "failed", "", _FAILED
    try:
        train()
        status, code = "finished", 0
    except Interrupted as stop:
        status, code = "interrupted", _exit_code(stop)
        line = "" if folder is None else _stopped_by(stop, folder, options)
    except (TrainingError, WorkerFailed) as error:
        if isinstance(error, WorkerFailed) and error.traceback:
            print(error.traceback, file=sys.stderr)
        line = _describe_failure(error, config, folder)
    finally:
        unwritten = "" if folder is None else end(folder, status)
    if code == 0 and unwritten:
        line, code = unwritten, _FAILED
    if code == 0 and folder is not None:
        _say_where(folder)
    if line:
        if config.world.processes > 1 and sys.stderr.isatty():
            # Take away the progress bar of a process that could not do it itself.
            print("\r\x1b[K", end="", file=sys.stderr)
        print(f"train: {line}", file=sys.stderr, flush=True)
    return code


def _stopped_by(stop: Interrupted, folder: RunFolder, options: Mapping[str, Any]) -> str:
    step = checkpoints.newest_step(folder)
    done = "before its first checkpoint" if step is None else f"after step {step}"
    named = options["output"] or options["resume"] or under_torchrun()
    again = "run the same command again" if named else f"use --resume {folder.path}"
    return f"stopped by {stop} {done}; {again} to go on"


def _describe_failure(error: Exception, config: RunConfig, folder: RunFolder | None) -> str:
    """What went wrong, what the run's folder keeps, and how to go on."""
    line = f"error: {_who()}{error}"
    if isinstance(error, WorkerFailed):
        one = config.world.processes == 2
        line += f", {'the other process was' if one else 'the others were'} stopped"
    if folder is not None:
        line += f"; {folder.kept()}"
        if isinstance(error, (WorkerFailed, PeerLost)):
            line += _way_on(folder)
    return line


def _way_on(folder: RunFolder) -> str:
    """How to go on with a run that was stopped from outside."""
    step = checkpoints.newest_step(folder)
    return "" if step is None else f"; --resume {folder.path} goes on after step {step}"


def _run_under_torchrun(options: Mapping[str, Any]) -> int:
    """Be one process of the world that torchrun started."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launch.die_with_parent(os.getppid())
    try:
        folder, config, code = _agree(options)
    except RuntimeError as error:
        if not launch.is_lost_peer(error):
            raise
        return _say(f"error: {_who()}{error}", _FAILED, everywhere=True)
    if config is None:
        return code

    def on_stuck(line: str) -> None:
        unwritten = ""
        if folder is not None:
            unwritten = end(folder, "failed")
            line += f"; {folder.kept()}{_way_on(folder)}"
        text = f"train: error: {_who()}{line}"
        print("\n".join(filter(None, (text, unwritten))), file=sys.stderr, flush=True)

    def train() -> None:
        with interrupts.noticed():
            launch.join_world(config.world, trainer.train, config, on_stuck=on_stuck)

    return _run(train, config, folder, options)


def _agree(options: Mapping[str, Any]) -> tuple[RunFolder | None, RunConfig | None, int]:
    """Rank 0's folder, the run's configuration, and an exit code where there is none.

    Rank 0 prepares the run, which may take it hours, before any collective waits for it. There is
    no configuration where the run is finished, or where a process can't take part, and says why.
    """
    size = int(os.environ["WORLD_SIZE"])
    folder, config, code, refusal, store = None, None, 0, "", None
    try:
        options = fine_tuning.with_file(options)
        device_type = choose_world(options, None).device_type
        store = launch.rendezvous(size) if size > 1 else None
        if rank() == 0:
            folder, config = prepare(options)
            code = 0 if config else _finished(folder)
        else:
            config, code = _receive_config(store, device_type)
    except (ValueError, OSError) as error:
        code, refusal = REFUSED, str(error)
        _say(f"error: {_who() if rank() else ''}{refusal}", code, everywhere=True)
    if store is None and size > 1 and "MASTER_ADDR" in os.environ:
        store = launch.rendezvous(size)  # to tell the others
    if store is None:
        return folder, config, code
    if rank() == 0:
        store.set("config", json.dumps([config and config.to_dict(), code]))
    store.set(f"refusal {rank()}", refusal)
    if rank() and config is None:
        return None, None, code
    waiting = "waits for the other processes"
    refused = [i for i in range(size) if launch.receive(store, f"refusal {i}", waiting)]
    if refused and not refusal:
        if folder is not None:
            _say(f"error: rank {refused[0]} can't take part, it says why", REFUSED)
            end(folder, "failed")
        return folder, None, REFUSED
    return folder, config, code


def _receive_config(store: Any, device_type: str) -> tuple[RunConfig | None, int]:
    """What rank 0 decided: a configuration, or an exit code.

    Raises:
        ValueError: where this process can't take part.
    """
    text = launch.receive(store, "config", "waits for rank 0, which prepares the data")
    values, code = json.loads(text)
    config = RunConfig.from_dict(values) if values else None
    if config is not None and config.world.device_type != device_type:
        raise ValueError(f"runs on {device_type}, rank 0 on {config.world.device_type}")
    return config, code


def _who() -> str:
    return f"rank {rank()}: " if under_torchrun() else ""


def _say_where(folder: RunFolder) -> None:
    print(f"weights: {folder.weights}, metrics: {folder.metrics}", flush=True)


def _say(message: str, code: int, everywhere: bool = False) -> int:
    """Print a line, of torchrun's processes rank 0 alone unless ``everywhere``; the code."""
    if everywhere or rank() == 0:
        print(f"train: {message}", file=sys.stderr, flush=True)
    return code
