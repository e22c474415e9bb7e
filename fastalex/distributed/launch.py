"""Where a run's processes come from: this one alone, its children, or torchrun.

No process outlives the others. The launcher stops all when one fails; each of them asks the
kernel to be killed when the launcher dies, however it dies. They meet on loopback, and nothing that
comes from a socket is unpickled: what they tell their launcher goes through pipes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, resource_tracker
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastalex.common import interrupts
from fastalex.common.interrupts import Interrupted as Interrupted
from fastalex.distributed.watch import STARTING, Watch
from fastalex.model.ablations import get_variant

_PR_SET_PDEATHSIG = 1
_LOOPBACK = "127.0.0.1"
_LOOK = 0.1  # seconds after which the launcher looks whether a signal came
_GRACE = 30.0  # seconds that processes have to save and to end after a signal
_PEER_LOST_WAIT = 20.0  # seconds in which the process that died first is found
_MEANWHILE, _SAY = 2.0, 60.0  # seconds between two looks, and two lines, while rank 0 prepares
_SHOWN = "CUDA_VISIBLE_DEVICES"
_NUMBERS = {1: "one", 2: "two"}

Result = TypeVar("Result")
_c10d: Any = dist  # exports its stores without saying so to a type checker

_watch: Watch | None = None  # on the other processes, while this one is a member of a world


class TrainingError(RuntimeError):
    """A run can't go on, for a reason that the user can act on; the message is for the user."""


class PeerLost(TrainingError):
    """The process at the other end of an exchange is gone, for a reason that it may tell."""


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


def watch() -> Watch | None:
    """What tells the other processes of this one's progress; None where it is alone."""
    return _watch


def _say(line: str) -> None:
    print(f"train: error: rank {rank()}: {line}", file=sys.stderr, flush=True)


# Called in any thread with the reason for which this process ends, just before it does.
give_up: Callable[[str], object] = _say


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
    if 0 < devices < local and not (devices == 1 and under_torchrun() and _SHOWN in os.environ):
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

    ``interrupts.requested`` tells each of them of the first signal that any of them or this
    process gets. They have ``_GRACE`` seconds to end then, and no time after a second signal.

    Args:
        world: more than one process are started here, each a child of this one.
        function: importable by name, as are the classes of its arguments and result.

    Raises:
        TrainingError: as the function raised it.
        WorkerFailed: where a process died or raised anything else.
        Interrupted: after a signal; all processes have ended.
    """
    with interrupts.noticed():
        if world.processes == 1:
            return in_process(world, function, *arguments)
        store = _serve()
        workers: list[_Worker] = []
        try:
            with _signals_kept_from_children():
                for number in range(world.processes):
                    workers.append(_Worker(number, store.port, world, function, arguments))
            result: Result = _supervise(workers)
            return result
        finally:
            for worker in workers:
                worker.kill()


def in_process(world: World, function: Callable[..., Result], *arguments: Any) -> Result:
    """Make this process a member of ``world``, call ``function``, and leave it again.

    Raises:
        PeerLost: where an exchange with another process failed.
    """
    global _watch
    torch.set_num_threads(world.threads)
    device = _device_index()
    if world.device_type == "cuda":
        torch.cuda.set_device(device)
    if world.processes == 1:
        return function(*arguments)
    store, number = meet(world.processes), rank()
    place, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    board = _c10d.TCPStore(place, port, wait_for_workers=False)  # another thread has its own
    board = _c10d.PrefixStore(f"watch {store.get('session').hex()}", board)
    with Watch(board, number, world.processes, lambda line: give_up(line)) as watch:
        _watch = watch
        try:
            dist.init_process_group(
                "nccl" if world.device_type == "cuda" else "gloo",
                store=_c10d.PrefixStore("groups", store),
                rank=number,
                world_size=world.processes,
                timeout=timedelta(seconds=STARTING),  # `watch` notices earlier who is missing
                device_id=torch.device("cuda", device) if world.device_type == "cuda" else None,
            )
            if (signum := interrupts.requested()) is not None:
                raise Interrupted(signum)
            result = function(*arguments)
        except Exception as error:
            if is_lost_peer(error):
                raise PeerLost(watch.who_left(lambda: interrupts.requested() is None)) from error
            raise
    dist.destroy_process_group()
    return result


def _device_index() -> int:
    """This process's GPU; the only one where a scheduler shows each process its own."""
    return min(int(os.environ.get("LOCAL_RANK", 0)), max(0, torch.cuda.device_count() - 1))


@functools.cache
def meet(processes: int) -> Any:
    """The store that all processes share, empty: a torch.distributed.Store; torchrun has one.

    torchrun gives a restarted world the store of the one before, with all that was written to it.
    So each process writes a name of its own there, and goes on once all have seen the same names.
    """
    timeout = timedelta(seconds=STARTING)
    store: Any
    store, _, _ = next(_c10d.rendezvous("env://", timeout=timeout))
    store = _c10d.PrefixStore(f"fastalex {processes}", store)
    store.set(f"name {rank()}", uuid.uuid4().hex)
    while True:
        names = b"".join(store.get(f"name {number}") for number in range(processes))
        store.set(f"seen {rank()}", names)
        if all(store.get(f"seen {number}") == names for number in range(processes)):
            store = _c10d.PrefixStore(names.hex(), store)
            store.set("session", names)
            return store
        time.sleep(_LOOK)


def receive(store: Any, key: str, waiting: str) -> str:
    """The text under ``key``, whenever it comes; ``waiting`` is said on stderr each minute."""
    started = said = time.monotonic()
    while True:
        with contextlib.suppress(dist.DistStoreError):  # not there yet
            store.wait([key], timedelta(seconds=_MEANWHILE))
            return str(store.get(key).decode())
        if time.monotonic() - said > _SAY:
            said = time.monotonic()
            print(
                f"train: rank {rank()}: {waiting}, for {said - started:.0f} s now", file=sys.stderr
            )


class _Worker:
    """A process of this machine's own world, and the pipe by which it says how it ended."""

    def __init__(
        self, number: int, port: int, world: World, function: Callable[..., Any], arguments: Any
    ) -> None:
        self.number = number
        self.said: tuple[str, Any] | None = None
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe(duplex=False)
        environment = {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(world.processes),
            "LOCAL_WORLD_SIZE": str(world.processes),
            "MASTER_ADDR": _LOOPBACK,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 is not to make another one
        }
        self.process = context.Process(
            target=_work, args=(theirs, os.getpid(), environment, world, function, arguments)
        )
        self.process.start()
        theirs.close()

    def outcome(self) -> tuple[str, Any]:
        """How it ended: what it said, or the exception that says how it died."""
        who = f"rank {self.number} (process {self.process.pid})"
        try:
            kind, value = self.pipe.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode or 0
            if -code in interrupts.SIGNALS:
                return "interrupted", -code
            return "failed", WorkerFailed(f"{who} {_describe_exit(code)}")
        if kind == "bug":
            value = WorkerFailed(f"{who} failed", value)
        return kind, value

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def _serve() -> Any:
    """Where the processes meet, on a port that nobody outside of this machine can reach."""
    listener = socket.create_server((_LOOPBACK, 0))
    return _c10d.TCPStore(
        _LOOPBACK,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _supervise(workers: list[_Worker]) -> Any:
    """Wait until all have ended; rank 0's result.

    Raises:
        TrainingError, WorkerFailed: what ended the first that failed by itself. That another lost
            the connection to it may be heard earlier, and is reported where nothing else comes.
        Interrupted: where a signal ended them.
    """
    waiting: dict[Any, _Worker] = {worker.pipe: worker for worker in workers}
    result, lost, told = None, None, False
    signum, last = None, math.inf
    while waiting and time.monotonic() < last:
        for pipe in connection.wait(list(waiting), _LOOK):
            worker = waiting.pop(pipe)
            kind, value = worker.outcome()
            if kind == "result":
                worker.process.join(_GRACE)
                result = value if worker.number == 0 else result
            elif kind == "interrupted":
                signum = signum or value
            elif kind == "lost":
                lost = lost or WorkerFailed(value)
                last = min(last, time.monotonic() + _PEER_LOST_WAIT)
            else:
                raise value
        signum = signum or interrupts.requested()
        if signum and not told:
            told, last = True, time.monotonic() + _GRACE
            for worker in waiting.values():
                os.kill(worker.process.pid or 0, signum)
    if signum:
        raise Interrupted(signum)
    if lost:
        raise lost
    return result


def _work(
    pipe: Any,
    parent: int,
    environment: dict[str, str],
    world: World,
    function: Callable[..., Any],
    arguments: Any,
) -> None:
    """Be one process of the world, and say how it ended."""
    die_with_parent(parent)
    os.environ.update(environment)
    if sys.platform == "linux":
        # All processes are here, whatever the host's name resolves to.
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")

    global give_up
    give_up = lambda line: pipe.send(("failed", WorkerFailed(line)))  # noqa: E731
    said: tuple[str, Any]
    for signum in set(interrupts.SIGNALS) - {signal.SIGHUP}:
        signal.signal(signum, signal.SIG_IGN)  # once it has saved: the launcher sends one more
    try:
        with interrupts.noticed():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupts.SIGNALS)
            said = "result", in_process(world, function, *arguments)
    except Interrupted as stop:
        said = "interrupted", stop.signum
    except PeerLost as error:
        said = "lost", str(error)
    except TrainingError as error:
        said = "failed", TrainingError(str(error))
    except Exception:
        said = "bug", traceback.format_exc()
    pipe.send(said)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when ``parent``, which started it, ends (Linux only)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(1)


def is_lost_peer(error: Exception) -> bool:
    """Whether an operation failed because a process at its other end is gone."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "gloo" in text or "connection closed by peer" in text or "connection reset" in text
    )


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    hint = " (the system does that when memory runs out)" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


@contextlib.contextmanager
def _signals_kept_from_children() -> Iterator[None]:
    """Block signals in this thread while it starts processes, which inherit its mask.

    One that is still importing could only die of a signal, or print a traceback. Each lets them
    through when it is ready for them.
    """
    resource_tracker.ensure_running()  # it unblocks signals when it starts
    signal.pthread_sigmask(signal.SIG_BLOCK, interrupts.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupts.SIGNALS)
