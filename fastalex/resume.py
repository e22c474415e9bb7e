"""Checkpoints of a run, and where a run goes on that was stopped.

``RUN/checkpoints/step-N.safetensors`` holds weights and velocities of the whole net, whatever
number of processes wrote it, and as JSON in the same file all else that the next step depends on.
Order, crops, colours and dropout are functions of the seed, the epoch and the step, so that there
is no state of a random generator to keep.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastalex.checkpoint import read_header, read_tensors, write_tensors
from fastalex.config import Settings
from fastalex.launch import World
from fastalex.provenance import versions
from fastalex.run_folder import RunFolder

FORMAT = "fastalex-checkpoint-1"
_NAME = re.compile(r"step-(\d+)\.safetensors")
_WEIGHT, _VELOCITY = "weight ", "velocity "  # in front of a parameter's name


@dataclass(frozen=True)
class Start:
    """Where a stopped run goes on.

    Attributes:
        folder: of the run.
        settings: the run's.
        world: the processes that it ran on.
        versions: of what its numbers depend on, as ``provenance.versions`` gave them.
        path: the checkpoint; None where the run stopped before its first one.
        state: what the checkpoint holds besides tensors.
    """

    folder: Path
    settings: Settings
    world: World
    versions: dict[str, str]
    path: Path | None
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state.get("step", 0))

    @property
    def finished(self) -> bool:
        return self.path is not None and self.step >= self.state["steps"]

    def tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Weights and velocities of the whole net; the file was checked when it was found."""
        assert self.path is not None
        tensors, _ = read_tensors(self.path, FORMAT, check=False)
        weights, velocities = (
            {name.removeprefix(kind): t for name, t in tensors.items() if name.startswith(kind)}
            for kind in (_WEIGHT, _VELOCITY)
        )
        return weights, velocities

    def differences(self, world: World) -> list[str]:
        """What is not as it was, so that the run will equal one never stopped to rounding only."""
        before, now = vars(self.world), vars(world)
        lines = [f"{now[n]} {n} instead of {before[n]}" for n in before if before[n] != now[n]]
        here = versions()
        lines += [
            f"{n} {here.get(n)} instead of {v}"
            for n, v in self.versions.items()
            if here.get(n) != v
        ]
        return lines


def save(
    folder: RunFolder,
    weights: Mapping[str, torch.Tensor],
    velocities: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> None:
    """Write the checkpoint of ``state["step"]``, and drop all but the newest ``keep``.

    Raises:
        OSError: where it can't be written; the older ones are as they were.
    """
    tensors = {_WEIGHT + name: t for name, t in weights.items()}
    tensors |= {_VELOCITY + name: t for name, t in velocities.items()}
    folder.checkpoints.mkdir(exist_ok=True)
    path = folder.checkpoints / f"step-{state['step']:08d}.safetensors"
    write_tensors(path, tensors, FORMAT, {"state": dict(state)})
    for old in _found(folder)[keep:]:
        old.unlink()


def find(run: Path) -> tuple[Start, list[str]]:
    """Where the run in the folder ``run`` goes on, and a line for each damaged checkpoint.

    Raises:
        ValueError: where the folder holds no run, or no checkpoint of it is whole.
    """
    folder = RunFolder(run)
    if not folder.report.is_file():
        raise ValueError(f"--resume {run}: no run in it, there is no {folder.report.name}")
    try:
        report = json.loads(folder.report.read_text(encoding="utf-8"))
        chosen = report["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--resume {run}: {folder.report.name} can't be read: {error}") from error
    paths = _found(folder)
    damaged: list[str] = []
    for path in paths:
        try:
            _, metadata = read_tensors(path, FORMAT)
            state = metadata["state"]
            start = _start(run, state["settings"], state["world"], state["versions"], path, state)
            return start, damaged
        except (ValueError, KeyError, TypeError) as error:
            damaged.append(str(error))
    if paths:
        raise ValueError(f"--resume {run}: no whole checkpoint is left: {damaged[0]}")
    try:
        return _start(run, chosen, report["world"], report["versions"], None, {}), []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--resume {run}: {folder.report.name} can't be used: {error}") from error


def last_step(folder: RunFolder) -> int | None:
    """The step of the newest checkpoint whose header can be read."""
    for path in _found(folder):
        try:
            return int(read_header(path, FORMAT)["state"]["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return None


def _start(
    run: Path,
    settings: Mapping[str, Any],
    world: Mapping[str, Any],
    written_by: Mapping[str, str],
    path: Path | None,
    state: dict[str, Any],
) -> Start:
    chosen = Settings.from_dict(settings)
    return Start(run, chosen, World(**world), dict(written_by), path, state)


def _found(folder: RunFolder) -> list[Path]:
    """The checkpoints, newest first."""
    if not folder.checkpoints.is_dir():
        return []
    steps = {
        int(match[1]): path
        for path in folder.checkpoints.iterdir()
        if (match := _NAME.fullmatch(path.name))
    }
    return [steps[step] for step in sorted(steps, reverse=True)]
