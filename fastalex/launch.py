"""Where a run's processes come from: this one alone, torch's elastic launcher, or torchrun.

No process outlives the others. The launcher stops all when one fails; each of them asks the
kernel to be killed when the launcher dies, however it dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fastalex import interrupts
from fastalex.interrupts import Interrupted as Interrupted
from fastalex.variants import get_variant

_PR_SET_PDEATHSIG = 1
_PEER_LOST_WAIT = 20.0  # seconds in which the launcher finds the process that died first
_NUMBERS = {1: "one", 2: "two"}

Result = TypeVar("Result")


class TrainingError(RuntimeError):
    """A run can't go on, for a reason that the user can act on; the message is for the user."""


class WorkerFailed(Exception):
    """A process ended that should not have; ``traceback`` is its own where it left one."""

    def __init__(self, message: str, traceback: str | None = None) -> None:
        super().__init__(message)
        self.traceback = traceback


@dataclass(frozen=True)
class World:
    """The processes of a run and how they share the work.

    Attributes:
        device_type: ``"cuda"`` or ``"cpu"``.
        processes: how many, one per GPU.
        towers: processes that hold one net together, 1 or 2; the others are replicas.
        threads: CPU threads of each.
    """

    device_type: str
    processes: int
    towers: int
    threads: int

    @property
    def replicas(self) -> int:
        return self.processes // self.towers

    def describe(self) -> str:
        number = _NUMBERS.get(self.processes, str(self.processes))
        if self.device_type == "cuda":
            if self.processes == 1:
                return f"one GPU, {torch.cuda.get_device_name(0)}"
            return f"{number} GPUs, NCCL"  # asking for a name here would take memory on one
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        if self.processes == 1:
            return f"no GPU found: one CPU process, {threads}"
        return f"no GPU found: {number} CPU processes, gloo, {threads} each"


def under_torchrun() -> bool:
    """Whether this process was started as one of a world."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process's number, 0 where it is alone."""
    return int(os.environ["RANK"]) if under_torchrun() else 0


def find_world(gpus: int | None, variant: str, threads: int | None = None) -> World:
    """The processes to run on, from what was asked for and what the machine has.

    Args:
        gpus: processes asked for; None is one, or what torchrun started.
        variant: one with two independent towers is cut in two where there are two processes,
            another is copied.
        threads: per process; None shares out the cores, or follows ``OMP_NUM_THREADS``.

    Raises:
        ValueError: where the machine lacks what was asked for, with what to do instead.
    """
    processes = gpus or 1
    local = processes
    if under_torchrun():
        processes = int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        if gpus not in (None, processes):
            raise ValueError(
                f"--gpus {gpus} under a launcher that started {processes} processes: "
                f"leave --gpus out or pass --gpus {processes}"
            )
    devices = torch.cuda.device_count()
    if 0 < devices < local:
        raise ValueError(
            f"{local} processes need {local} GPUs and there is {_NUMBERS.get(devices, devices)}: "
            "use --gpus 1, or set CUDA_VISIBLE_DEVICES= to run them on the CPU"
        )
    towers = get_variant(variant).towers
    return World(
        device_type="cuda" if devices else "cpu",
        processes=processes,
        towers=towers if processes % towers == 0 else 1,
        threads=threads or _threads(local),
    )


def _threads(processes: int) -> int:
    # torchrun sets OMP_NUM_THREADS=1 unasked, so there it says nothing about what the user wants.
    if "OMP_NUM_THREADS" in os.environ and not under_torchrun():
        return torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // processes)


def run(world: World, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call ``function(*arguments)`` in every process of ``world`` and return rank 0's result.

    Args:
        world: more than one process are started here, through torch's elastic launcher.
        function: importable by name, as are the classes of its arguments and result.

    Raises:
        TrainingError: as the function raised it.
        WorkerFailed: where a process died or raised anything else.
        Interrupted: on SIGINT, SIGTERM and the like; all processes have ended.
    """
    if world.processes == 1:
        with interrupts.noticed():
            return in_process(world, function, *arguments)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world.processes,
        run_id=f"fastalex-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    _silence_launcher()
    strangers = multiprocessing.active_children()
    try:
        with _interrupts_kept_from_children():
            results = elastic_launch(config, _worker)(os.getpid(), world, function, *arguments)
    except ChildFailedError as error:
        raise _explain(*error.get_first_failure()) from None
    except SignalException as error:
        raise Interrupted(error.sigval) from None
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT) from None
    finally:
        _kill_children(strangers)
    result: Result = results[0]
    return result


def in_process(world: World, function: Callable[..., Result], *arguments: Any) -> Result:
    """Make this process a member of ``world``, call ``function``, and leave it again."""
    torch.set_num_threads(world.threads)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if world.device_type == "cuda":
        torch.cuda.set_device(local_rank)
    if world.processes == 1:
        return function(*arguments)
    if world.device_type == "cuda":
        dist.init_process_group("nccl", device_id=torch.device("cuda", local_rank))
    else:
        dist.init_process_group("gloo")
    try:
        result = function(*arguments)
    except Exception as error:
        if is_lost_peer(error):
            # The other process has died or is about to say why it ends: its reason is the one to
            # report, and the launcher stops this process once it has it.
            time.sleep(_PEER_LOST_WAIT)
            raise TrainingError("lost the connection to another process") from error
        raise
    dist.destroy_process_group()
    return result


def _worker(parent: int, world: World, function: Callable[..., Result], *arguments: Any) -> Result:
    die_with_parent(parent)
    # The launcher decides what an interrupt does; here it ends the process without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if sys.platform == "linux":
        # Both processes are here, whatever the host's name resolves to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return in_process(world, function, *arguments)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when ``parent``, which started it, ends (Linux only)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(1)


def is_lost_peer(error: Exception) -> bool:
    """Whether an operation failed because a process at its other end is gone."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "gloo" in text or "connection closed by peer" in text or "connection reset" in text
    )


def _explain(rank: int, failure: ProcessFailure) -> Exception:
    """What to raise for the process that failed first."""
    who = f"rank {rank} (process {failure.pid})"
    if failure.exitcode < 0:
        hint = ""
        if failure.exitcode == -signal.SIGKILL:
            hint = " (the system does that when memory runs out)"
        return WorkerFailed(f"{who} was killed by {failure.signal_name()}{hint}")
    report: Any = failure.message
    if not isinstance(report, dict):
        return WorkerFailed(f"{who} ended with exit code {failure.exitcode}")
    kind, _, text = report["message"].partition(": ")
    if kind == TrainingError.__name__:
        return TrainingError(text)
    return WorkerFailed(f"{who} failed", report["extraInfo"]["py_callstack"])


@contextlib.contextmanager
def _interrupts_kept_from_children() -> Iterator[None]:
    """Block Ctrl-C in this thread, because new processes inherit its mask.

    A terminal sends Ctrl-C to all of them, and one that is still importing would print a
    traceback. Another thread takes the signal for this process; Python handles it here.
    """
    resource_tracker.ensure_running()  # it unblocks the signal when it starts
    done = threading.Event()
    threading.Thread(target=done.wait, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        done.set()


def _kill_children(strangers: list[multiprocessing.process.BaseProcess]) -> None:
    """End what the launcher may have left, when it was interrupted while starting processes."""
    for child in multiprocessing.active_children():
        if child not in strangers:
            child.kill()
            child.join()


def _silence_launcher() -> None:
    """Keep the launcher's own reports off the terminal: ours follow."""
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logger = logging.getLogger(name)
        logger.propagate = False
        logger.addHandler(logging.NullHandler())
