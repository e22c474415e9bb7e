"""Checkpoints of a run, and where a run goes on that was stopped.

``RUN/checkpoints/step-N.safetensors`` holds weights and momentum buffers of the whole net, whatever
number of processes wrote it, and as JSON in the same file all else that the next step depends on.
Order, crops, colours and dropout are functions of the seed, the epoch and the step, so that there
is no state of a random generator to keep.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastalex.common.provenance import versions
from fastalex.distributed.world import World
from fastalex.training.config import (
    RESUMABLE,
    Settings,
    as_option,
    describe_setting,
    setting_names,
)
from fastalex.training.run_folder import RunFolder
from fastalex.training.weights import read_metadata, read_tensors, write_tensors

FORMAT = "fastalex-checkpoint-1"
_NAME = re.compile(r"step-(\d+)\.safetensors")
_WEIGHT, _BUFFER = "weight ", "velocity "  # in front of a parameter's name in a file


@dataclass(frozen=True)
class ResumeState:
    """Where a stopped run goes on."""

    folder: Path
    report: dict[str, Any]  # run.json
    path: Path | None  # the checkpoint; None where the run stopped before its first one
    state: dict[str, Any]  # what the checkpoint holds besides tensors
    world: World  # the processes that it ran on
    settings: Settings

    @property
    def step(self) -> int:
        return int(self.state.get("step", 0))

    @property
    def finished(self) -> bool:
        if self.path is None:
            return bool(self.report.get("status") == "finished")
        batches = -(-self.state["images"][0] // self.settings.batch_size)
        # Behind the last batch of an epoch its validation is still to come.
        last = last_step(self.settings, batches, self.state)
        return self.state["batch"] == 0 and self.step >= last

    def choose(self, arguments: Mapping[str, Any], named: bool) -> Settings:
        """The run's settings with what ``arguments`` may change of them.

        Args:
            arguments: from ``parse_arguments``.
            named: whether the run was named by --resume, which keeps what is not given. Otherwise
                the command has to come to the settings that the run was started with.

        Raises:
            ValueError: where the command has other settings than the run; one line with both.
        """
        kept = vars(self.settings)
        if arguments["precision"] in (None, "auto"):
            arguments = {**arguments, "precision": kept["precision"]}  # whatever it was on
        given = {n: arguments[n] for n in setting_names() if arguments[n] is not None}
        values = given if named else vars(Settings.choose(arguments, self.world.device_type))
        changed = {n for n in set(values) - set(RESUMABLE) if values[n] != kept[n]}
        if not named and (values["data"] is None) != (kept["data"] is None):
            changed.add("data")
        longer = "epochs" in changed and values["epochs"] > kept["epochs"]
        if longer and self.finished and self.path:
            changed.remove("epochs")
        if changed:
            why = "give the options that it was started with, or name another folder"
            if changed == {"epochs"} and longer:
                why = "it is not finished yet"
                if self.finished:
                    why = "it kept no checkpoint to go on from"
            elif named:
                why = f"leave out {', '.join(map(as_option, sorted(changed)))}"
            both = [
                f"{describe_setting(n, kept[n])} and not {describe_setting(n, values[n])}"
                for n in sorted(changed)
            ]
            option = "--resume" if named else "--output"
            raise ValueError(f"{option} {self.folder}: the run has {', '.join(both)}; {why}")
        renewed = {n: value for n, value in given.items() if n in (*RESUMABLE, "epochs")}
        return dataclasses.replace(self.settings, **renewed)

    def differences(self, world: World) -> list[str]:
        """What is not as it was, so that the run will equal one never stopped to rounding only."""
        pairs = [
            (vars(self.world), vars(world)),
            ((self.state or self.report)["versions"], versions()),
        ]
        return [
            f"{now.get(name)} {name} instead of {value}"
            for before, now in pairs
            for name, value in before.items()
            if now.get(name) != value
        ]


def save(
    folder: RunFolder,
    weights: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> None:
    """Write the checkpoint of ``state["step"]``, and drop all but the newest ``keep``."""
    tensors = {_WEIGHT + name: t for name, t in weights.items()}
    tensors |= {_BUFFER + name: t for name, t in buffers.items()}
    folder.checkpoints.mkdir(exist_ok=True)
    path = folder.checkpoints / f"step-{state['step']:08d}.safetensors"
    write_tensors(path, tensors, FORMAT, {"state": dict(state)})
    drop(folder, path, keep)


def tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and momentum buffers of the whole net; the file was checked when it was found."""
    found, _ = read_tensors(path, FORMAT, check=False)
    weights, buffers = (
        {name.removeprefix(kind): t for name, t in found.items() if name.startswith(kind)}
        for kind in (_WEIGHT, _BUFFER)
    )
    return weights, buffers


def drop(folder: RunFolder, newest: Path | None, keep: int) -> None:
    """Remove all checkpoints but ``keep``, if ``newest`` is the newest of them, and whole."""
    found = _found(folder)
    if newest is not None and found[:1] == [newest]:
        for old in found[max(keep, 1) :]:
            old.unlink()


def last_step(settings: Settings, batches: int, state: Mapping[str, Any]) -> int:
    """The step at which a run ends; its epochs have ``batches`` batches from ``state`` on."""
    left = settings.epochs - state.get("epoch", 1) + 1
    steps: int = state.get("step", 0) + left * batches - min(state.get("batch", 0), batches)
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def find(run: Path, option: str = "--resume") -> tuple[ResumeState, list[str]]:
    """Where the run in the folder ``run`` goes on, and a line for each damaged checkpoint.

    Raises:
        ValueError: where run.json can't be used, or no checkpoint is whole.
    """
    folder, damaged = RunFolder(run), list[str]()
    try:
        report = folder.read_report()
        Settings.from_dict(report["settings"])
        for path in _found(folder):
            try:
                return _read(run, report, path), damaged
            except (ValueError, KeyError, TypeError) as error:
                damaged.append(str(error))
        if damaged:
            raise ValueError(f"no whole checkpoint is left: {damaged[0]}")
        return _read(run, report, None), []
    except (KeyError, TypeError) as error:
        raise ValueError(f"{option} {run}: {folder.report.name} can't be used: {error}") from error
    except ValueError as error:
        raise ValueError(f"{option} {run}: {error}") from error


def _read(run: Path, report: dict[str, Any], path: Path | None) -> ResumeState:
    state = {} if path is None else read_tensors(path, FORMAT)[1]["state"]
    world = World(**(state or report)["world"])
    settings = Settings.from_dict(report["settings"], world.device_type)
    return ResumeState(run, report, path, state, world, settings)


def newest_step(folder: RunFolder) -> int | None:
    """The step of the newest checkpoint whose header can be read."""
    for path in _found(folder):
        try:
            return int(read_metadata(path, FORMAT)["state"]["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return None


def _found(folder: RunFolder) -> list[Path]:
    """The checkpoints, newest first."""
    names = folder.checkpoints.iterdir() if folder.checkpoints.is_dir() else ()
    steps = {int(match[1]): path for path in names if (match := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps, reverse=True)]
