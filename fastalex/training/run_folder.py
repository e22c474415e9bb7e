"""The folder of a run: run.json, metrics.jsonl, weights and checkpoints.

Nothing here is half written under its own name: whole files are replaced, and metrics.jsonl only
ever grows by whole lines, until a resumed run cuts off those behind its checkpoint.

metrics.jsonl is also the lock. Who claims the folder takes it alone and then shares it with the
process that appends, so that it is free once the last of both has ended, however they end.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastalex.common.files import is_temporary, replacing
from fastalex.common.provenance import commit, versions
from fastalex.training.metrics import open_locked
from fastalex.training.weights import read_metadata

_ROOT = Path("runs")


class RunFolder:
    """Where a run writes; ``claim`` gives one that no other process can write to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.report, self.metrics = path / "run.json", path / "metrics.jsonl"
        self.weights, self.best = path / "model.safetensors", path / "best.safetensors"
        self.checkpoints, self.tensorboard = path / "checkpoints", path / "tensorboard"
        self.running = False  # whether a run has started or gone on here
        self._lock: int | None = None
        self._made: list[Path] = []  # the folders that claiming it made, the outermost first
        self._locked_new = False  # whether claiming it made metrics.jsonl

    @property
    def holds_run(self) -> bool:
        return self.report.is_file()

    @classmethod
    def claim(cls, path: Path, option: str = "--output", new: bool = False) -> RunFolder:
        """The folder at ``path``, made if need be, and no other process's until it is released.

        It holds a run, or nothing but what a killed process left that was about to begin one.

        Args:
            path: of the folder.
            option: that named it, for a message.
            new: whether it has to be made here.

        Raises:
            FileExistsError: where it is ``new`` and there already.
            ValueError: one line on what is there or why nothing can be; nothing was written.
        """
        folder = cls(path)
        try:
            folder._make()
            if new and path not in folder._made:
                raise FileExistsError
            folder._locked_new = not folder.metrics.exists()
            folder._lock = open_locked(folder.metrics, alone=True)
            if not folder.holds_run:
                folder._check_empty()
            folder._clean()
        except OSError as error:
            folder.release()
            if isinstance(error, FileExistsError):
                raise
            text = error.strerror or str(error)
            if error.filename is not None and error.errno != errno.EBUSY:  # no sentence of ours
                text = f"nothing can be written there: {text} ({error.filename})"
            raise ValueError(f"{option} {path}: {text}") from error
        return folder

    def release(self) -> None:
        """Give up the claim; where no run has started, take away what it made."""
        with contextlib.suppress(OSError):  # what is not empty stays
            new = self._lock is not None and self._locked_new and not self.running
            if new and _is_empty(self.metrics):
                self.metrics.unlink()
            for made in reversed(self._made):
                made.rmdir()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _make(self) -> None:
        missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process was quicker
                path.mkdir()
                self._made.append(path)
        if not self.path.is_dir():
            raise OSError(errno.ENOTDIR, "not a folder, name a new or empty one")

    def _check_empty(self) -> None:
        """Raise unless all that is here was left by a run that did not begin."""
        for path in self.path.iterdir():
            if not is_temporary(path) and not (path == self.metrics and _is_empty(path)):
                text = f"the folder is not empty ({path.name}) and holds no run, name a new one"
                raise OSError(errno.ENOTEMPTY, text)

    def _clean(self) -> None:
        """Remove what killed processes left; only who holds the claim knows that they are dead."""
        for folder in filter(Path.is_dir, (self.path, self.checkpoints)):
            for left in filter(is_temporary, folder.iterdir()):
                left.unlink(missing_ok=True)

    def begin(
        self,
        arguments: Mapping[str, Any],
        settings: Mapping[str, Any],
        world: Mapping[str, Any],
        after: int | None = None,
    ) -> None:
        """Write run.json: what was asked for, what was chosen, and on what it runs.

        ``after`` is the step after which a run goes on, None for a new one.
        """
        now = {
            "arguments": dict(arguments),
            "world": dict(world),
            "versions": versions(),
            "commit": commit(),
            "host": socket.gethostname(),
            "started": _now(),
        }
        report = {"status": "running", **now, "seed": settings["seed"], "resumed": []}
        if after is not None:
            report = self.read_report()
            report["resumed"] = [*report.get("resumed", []), {"step": after, **now}]
        report |= {"status": "running", "ended": None}
        self._write_report({**report, "launch": launch_id(), "settings": dict(settings)})
        self.running = True

    def end(self, status: str) -> None:
        """Note in run.json how the run ended, and drop what nobody needs any more."""
        self._clean()
        report = self.read_report()
        if report["status"] != status:
            self._write_report({**report, "status": status, "ended": _now()})
        if status == "finished" and not report["settings"]["keep_checkpoints"]:
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def keep_best(self) -> None:
        """Make the newest weights the best ones; both are one file until the next epoch."""
        with replacing(self.best) as temporary:
            try:
                os.link(self.weights, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(self.weights, temporary)

    def kept(self) -> str:
        """What an ended run has left here, for a message."""
        if not self.path.is_dir():
            return f"{self.path} is gone"
        with contextlib.suppress(ValueError):
            epoch = read_metadata(self.weights)["epoch"]
            return f"{self.path} keeps model.safetensors of epoch {epoch} and metrics.jsonl"
        return f"{self.path} keeps metrics.jsonl, no weights yet"

    def read_report(self) -> dict[str, Any]:
        """What run.json holds."""
        try:
            report = json.loads(self.report.read_text(encoding="utf-8"))
            return {"settings": report["settings"], **report}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.report.name} can't be read: {error!r}") from error

    def _write_report(self, report: dict[str, Any]) -> None:
        with replacing(self.report) as temporary:
            temporary.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")

    def processes(self) -> int | None:
        """How many the run here had when it was last started; None where there is none."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            report = self.read_report()
            return int([report, *report["resumed"]][-1]["world"]["processes"])
        return None


def launch_id() -> str | None:
    """What all attempts of one torchrun have in common; None where there is no torchrun."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    # Not every torchrun has an id of its own; the process that started this one does.
    return f"{socket.gethostname()} {os.getppid()}" if run == "none" else run


def find_attempt() -> Path | None:
    """The newest folder below ``runs`` that an earlier attempt of this torchrun made.

    One that is finished counts only for an attempt that torchrun knows to be another one.
    """
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    reports = [report for report in _ROOT.glob("*/run.json") if launch_id() is not None]
    for path in sorted(reports, key=lambda report: report.stat().st_mtime, reverse=True):
        with contextlib.suppress(ValueError):
            report = RunFolder(path.parent).read_report()
            if report.get("launch") == launch_id() and (again or report["status"] != "finished"):
                return path.parent
    return None


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def next_free(variant: str, seed: int) -> Path:
    """The next free ``runs/VARIANT-SEED-NNN``."""
    pattern = re.compile(rf"{re.escape(variant)}-{seed}-(\d+)")
    names = [path.name for path in _ROOT.iterdir()] if _ROOT.is_dir() else []
    numbers = [int(match[1]) for name in names if (match := pattern.fullmatch(name))]
    return _ROOT / f"{variant}-{seed}-{1 + max(numbers, default=0):03d}"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
