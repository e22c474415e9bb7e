"""The folder of a run: run.json, metrics.jsonl, weights and checkpoints.

Nothing here is half written under its own name: whole files are replaced, and metrics.jsonl only
ever grows by whole lines, until a resumed run cuts off those behind its checkpoint.

metrics.jsonl is also the lock. Who claims the folder takes it alone and then shares it with the
process that appends, so that it is free once the last of both has ended, however they end.
"""

from __future__ import annotations

import contextlib
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

from fastalex.common.files import is_temporary, replacing
from fastalex.common.provenance import commit, versions
from fastalex.training.weights import read_metadata

_LOCK_SECONDS = 10.0  # within which the processes of a killed launcher have ended
_SYNC_SECONDS = 1.0  # records of steps reach the disk this soon, those of epochs at once
_ROOT = Path("runs")


class RunFolder:
    """Where a run writes; ``claim`` and ``create`` give one that no other process can write to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.running = False  # whether a run has started or gone on here
        self._lock: int | None = None
        self._made: list[Path] = []  # the folders that claiming it made, the outermost first
        self._locked_new = False  # whether claiming it made metrics.jsonl

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
            new: whether the folder has to be made here.

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
            folder._lock = _lock(folder.metrics, alone=True)
            if not folder.holds_run:
                folder._check_empty()
            folder._clean()
        except FileExistsError:
            folder.release()
            raise
        except OSError as error:
            folder.release()
            raise ValueError(f"{option} {path}: {_why(error)}") from error
        return folder

    @classmethod
    def create(cls, variant: str, seed: int) -> RunFolder:
        """The next free ``runs/VARIANT-SEED-NNN``, claimed.

        Raises:
            ValueError: one line where it can't be made.
        """
        while True:
            number = 1 + max(_numbered(variant, seed), default=0)
            with contextlib.suppress(FileExistsError):  # another run was quicker
                return cls.claim(_ROOT / f"{variant}-{seed}-{number:03d}", new=True)

    def release(self) -> None:
        """Give up the claim; where no run has started, take away what it made."""
        with contextlib.suppress(OSError):
            if self._lock is not None and self._locked_new and _is_empty(self.metrics):
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
        for path in filter(self._is_foreign, self.path.iterdir()):
            text = f"the folder is not empty ({path.name}) and holds no run, name a new one"
            raise OSError(errno.ENOTEMPTY, text)

    def _is_foreign(self, path: Path) -> bool:
        """Whether ``path`` in the folder is neither ours nor left by a run that did not begin."""
        return not is_temporary(path) and not (path == self.metrics and _is_empty(path))

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
                "launch": launch_id(),
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

    def resume(
        self,
        arguments: Mapping[str, Any],
        settings: Mapping[str, Any],
        world: Mapping[str, Any],
        step: int,
    ) -> None:
        """Note in run.json that the run goes on after ``step``, how, and on what."""
        report = self.read_report()
        again = {
            "step": step,
            "arguments": dict(arguments),
            "world": dict(world),
            "versions": versions(),
            "commit": commit(),
            "host": socket.gethostname(),
            "started": _now(),
        }
        changed = {
            "status": "running",
            "launch": launch_id(),
            "settings": dict(settings),
            "resumed": [*report.get("resumed", []), again],
            "ended": None,
        }
        self._write_report({**report, **changed})

    def end(self, status: str) -> None:
        """Note in run.json how the run ended, and drop what nobody needs any more.

        Raises:
            OSError: where it can't be written.
        """
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
        try:
            epoch = read_metadata(self.weights)["epoch"]
        except ValueError:
            return f"{self.path} keeps metrics.jsonl, no weights yet"
        return f"{self.path} keeps model.safetensors of epoch {epoch} and metrics.jsonl"

    def _clean(self) -> None:
        """Remove what killed processes left; only who holds the claim knows that they are dead."""
        for folder in (self.path, self.checkpoints):
            if folder.is_dir():
                for left in filter(is_temporary, folder.iterdir()):
                    left.unlink(missing_ok=True)

    def read_report(self) -> dict[str, Any]:
        """What run.json holds.

        Raises:
            ValueError: where it is missing or damaged.
        """
        try:
            report = json.loads(self.report.read_text(encoding="utf-8"))
            return {"settings": report["settings"], **report}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.report.name} can't be read: {error!r}") from error

    def _write_report(self, report: dict[str, Any]) -> None:
        with replacing(self.report) as temporary:
            temporary.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
        self.running, self._made, self._locked_new = True, [], False


class MetricsLog:
    """Appends records to metrics.jsonl, one JSON object a line.

    A line reaches the system in one write, so that a killed process leaves whole lines, and the
    disk within about a second, so that a machine that loses power leaves nearly all of them.

    Args:
        path: of the file.
        length: bytes of an older file that stay, the rest is cut off; None is all.

    Raises:
        OSError: where it can't be written, or a process that does not belong to this run has it.
    """

    def __init__(self, path: Path, length: int | None = None) -> None:
        self._path = path
        self._file = _lock(path, alone=False)
        found = self.length
        self.missing = max(0, (length or 0) - found)  # bytes that an older file should have had
        if length is not None and length < found:
            os.ftruncate(self._file, length)
        self._synced = time.monotonic()

    @property
    def length(self) -> int:
        return os.fstat(self._file).st_size

    def append(self, record: dict[str, Any], sync: bool = False) -> None:
        """Add a record; ``sync`` waits until it is on the disk.

        Raises:
            OSError: where it can't be written whole; no part of it stays.
        """
        line, before = (json.dumps(record) + "\n").encode(), self.length
        try:
            while line:
                line = line[os.write(self._file, line) :]
            if sync or time.monotonic() - self._synced > _SYNC_SECONDS:
                self.sync()
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, before)
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)


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


def _lock(path: Path, alone: bool) -> int:
    """The file, open to append; as long as it is open, no other process can claim its folder.

    Args:
        path: of the file.
        alone: whether no other process may have it open already. Afterwards both kinds share it.

    Raises:
        OSError: where another process has it, or it can't be opened.
    """
    last = time.monotonic() + _LOCK_SECONDS
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if alone:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), path.stat()):  # else its owner took it away
                return file
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                return file  # this file system has no locks
            os.close(file)
            raise
        os.close(file)
        if time.monotonic() > last:
            raise OSError(errno.EBUSY, "another process trains in this folder", str(path))
        time.sleep(0.1)


def _why(error: OSError) -> str:
    """What went wrong with a folder, for the user who named it."""
    text = error.strerror or str(error)
    if error.filename is None or error.errno == errno.EBUSY:  # a sentence of ours
        return text
    return f"nothing can be written there: {text} ({error.filename})"


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def _numbered(variant: str, seed: int) -> dict[int, Path]:
    """The folders of runs that were not told where to write, by number."""
    pattern = re.compile(rf"{re.escape(variant)}-{seed}-(\d+)")
    paths = list(_ROOT.iterdir()) if _ROOT.is_dir() else []
    return {int(match[1]): p for p in paths if (match := pattern.fullmatch(p.name))}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
