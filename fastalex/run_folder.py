"""The folder of a run: run.json, metrics.jsonl, weights and checkpoints.

Nothing here is half written under its own name: whole files are replaced, and metrics.jsonl only
ever grows by whole lines, until a resumed run cuts off those behind its checkpoint.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastalex.checkpoint import read_metadata
from fastalex.files import replacing
from fastalex.provenance import commit, versions

_LOCK_SECONDS = 10.0  # within which the processes of a killed launcher have ended
_SYNC_SECONDS = 1.0  # records of steps reach the disk this soon, those of epochs at once
_ROOT = Path("runs")


class RunFolder:
    """Where a run writes; ``create`` makes one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def best(self) -> Path:
        """The weights of the epoch with the highest top-1 accuracy."""
        return self.path / "best.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "run.json"

    @classmethod
    def create(cls, output: Path | None, variant: str, seed: int) -> RunFolder:
        """Make ``output``, or the next free ``runs/VARIANT-SEED-NNN``.

        Raises:
            ValueError: where ``output`` can't hold a new run, as ``check_output`` says.
        """
        if output is not None:
            check_output(output)
            output.mkdir(parents=True, exist_ok=True)
            return cls(output)
        while True:
            path = _ROOT / f"{variant}-{seed}-{_next_number(variant, seed):03d}"
            try:
                path.mkdir(parents=True)
            except FileExistsError:  # another run was quicker
                continue
            return cls(path)

    def begin(
        self,
        arguments: Mapping[str, Any],
        settings: Mapping[str, Any],
        world: Mapping[str, Any],
    ) -> None:
        """Write run.json: what was asked for, what was chosen, and on what it runs."""
        self._write_report(
            {
                "status": "running",
                "arguments": dict(arguments),
                "settings": dict(settings),
                "world": dict(world),
                "seed": settings["seed"],
                "versions": versions(),
                "commit": commit(),
                "host": socket.gethostname(),
                "started": _now(),
                "resumed": [],
                "ended": None,
            }
        )

    def resume(self, arguments: Mapping[str, Any], world: Mapping[str, Any], step: int) -> None:
        """Note in run.json that the run goes on after ``step``, and on what."""
        self._clean()
        report = self._read_report()
        again = {
            "step": step,
            "arguments": dict(arguments),
            "world": dict(world),
            "versions": versions(),
            "commit": commit(),
            "host": socket.gethostname(),
            "started": _now(),
        }
        resumed = [*report.get("resumed", []), again]
        self._write_report({**report, "status": "running", "resumed": resumed, "ended": None})

    def end(self, status: str) -> None:
        """Note in run.json how the run ended, and drop what a killed writer left."""
        self._clean()
        self._write_report({**self._read_report(), "status": status, "ended": _now()})

    def keep_best(self) -> None:
        """Make the newest weights the best ones; both are one file until the next epoch."""
        with replacing(self.best) as temporary:
            try:
                os.link(self.weights, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(self.weights, temporary)

    def kept(self) -> str:
        """What an ended run has left here, for a message."""
        try:
            epoch = read_metadata(self.weights)["epoch"]
        except ValueError:
            return f"{self.path} keeps metrics.jsonl, no weights yet"
        return f"{self.path} keeps model.safetensors of epoch {epoch} and metrics.jsonl"

    def _clean(self) -> None:
        for folder in (self.path, self.checkpoints):
            for left in folder.glob(".*.tmp"):
                left.unlink(missing_ok=True)

    def _read_report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.report.read_text(encoding="utf-8"))
        return report

    def _write_report(self, report: dict[str, Any]) -> None:
        with replacing(self.report) as temporary:
            temporary.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")


class MetricsLog:
    """Appends records to metrics.jsonl, one JSON object a line; one process at a time may.

    A line reaches the system in one write, so that a killed process leaves whole lines, and the
    disk within about a second, so that a machine that loses power leaves nearly all of them.

    Args:
        path: of the file.
        length: bytes of an older file that stay, the rest is cut off; None is all.

    Raises:
        OSError: where another process has the file open, or it can't be written.
    """

    def __init__(self, path: Path, length: int | None = None) -> None:
        self._file = _open_alone(path)
        found = self.length
        self.missing = max(0, (length or 0) - found)  # bytes that an older file should have had
        if length is not None and length < found:
            os.ftruncate(self._file, length)
        self._synced = time.monotonic()

    @property
    def length(self) -> int:
        return os.fstat(self._file).st_size

    def append(self, record: dict[str, Any], sync: bool = False) -> None:
        """Add a record; ``sync`` waits until it is on the disk."""
        os.write(self._file, (json.dumps(record) + "\n").encode())
        if sync or time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        os.fsync(self._file)
        os.close(self._file)


def _open_alone(path: Path) -> int:
    """The file, open to append and locked as long as this process lives."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    last = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > last:
                os.close(file)
                text = "another process trains in this folder"
                raise OSError(errno.EBUSY, text, str(path)) from None
            time.sleep(0.1)


def check_idle(folder: RunFolder) -> None:
    """Raise if another process trains in ``folder``.

    Raises:
        ValueError: one line that says so.
    """
    if not folder.metrics.exists():
        return
    try:
        os.close(_open_alone(folder.metrics))
    except OSError as error:
        raise ValueError(f"--resume {folder.path}: {error.strerror}") from error


def check_output(output: Path) -> None:
    """Raise unless ``output`` is an empty folder or a place for a new one.

    Raises:
        ValueError: one line that says what is there.
    """
    if output.is_dir():
        names = {entry.name for entry in output.iterdir()}
        if names:
            what = "holds another run" if "run.json" in names else "is not empty"
            raise ValueError(f"--output {output}: the folder {what}, name a new or empty one")
    elif output.exists():
        raise ValueError(f"--output {output}: not a folder, name a new or empty one")
    place = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"--output {output}: nothing can be written in {place}")


def _next_number(variant: str, seed: int) -> int:
    pattern = re.compile(rf"{re.escape(variant)}-{seed}-(\d+)")
    names = [path.name for path in _ROOT.iterdir()] if _ROOT.is_dir() else []
    matches = [pattern.fullmatch(name) for name in names]
    return 1 + max((int(m[1]) for m in matches if m), default=0)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
