"""Where a run's processes come from: this one alone, its children, or torchrun.

No process outlives the others. The launcher stops all when one fails; each of them asks the
kernel to be killed when the launcher dies, however it dies. They meet on loopback, and nothing that
comes from a socket is unpickled: what they tell their launcher goes through pipes. This is not
left to torch: torch.distributed.run listens on every interface, and torch.multiprocessing hands
on no signal and, of what a process raised, a traceback alone.
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
from datetime import timedelta
from multiprocessing import connection, resource_tracker
from typing import Any

import torch
import torch.distributed as dist

from fastalex.common import interrupts
from fastalex.common.interrupts import Interrupted
from fastalex.distributed.watchdog import STARTING, Watchdog
from fastalex.distributed.world import World, device_index, rank

_PR_SET_PDEATHSIG = 1
_LOOPBACK = "127.0.0.1"
_LOOK = 0.1  # seconds after which the launcher looks whether a signal came
_GRACE = 30.0  # seconds that processes have to save and to end after a signal
_PEER_LOST_WAIT = 20.0  # seconds in which the process that died first is found
_SAY = 60.0  # seconds between two lines of a process that waits
_JOINING = 600.0  # seconds in which every process has to start

_c10d: Any = dist  # exports its stores without saying so to a type checker
_watchdog: Watchdog | None = None  # while this process is a member of a world of several


class TrainingError(RuntimeError):
    """A run can't go on, for a reason that the user can act on; the message is for the user."""


class PeerLost(TrainingError):
    """The process at the other end of an exchange is gone, for a reason that it may tell."""


class WorkerFailed(Exception):
    """A process ended that should not have; ``traceback`` is its own where it left one."""

    def __init__(self, message: str, traceback: str | None = None) -> None:
        super().__init__(message)
        self.traceback = traceback


def watchdog() -> Watchdog | None:
    """What tells the other processes of this one's progress; None where it is alone."""
    return _watchdog


def run(world: World, function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(*arguments)`` in every process of ``world``.

    ``interrupts.requested`` tells each of them of the first signal that any of them or this
    process gets. They have ``_GRACE`` seconds to end then, and no time after a second signal.

    Args:
        world: more than one process are started here, each a child of this one.
        function: importable by name, as are the classes of its arguments.

    Raises:
        TrainingError: as the function raised it.
        WorkerFailed: where a process died or raised anything else.
        Interrupted: after a signal; all processes have ended.
    """
    with interrupts.noticed():
        if world.processes == 1:
            return join_world(world, function, *arguments)
        store = _serve()
        workers: list[_Worker] = []
        try:
            with _signals_kept_from_children():
                for number in range(world.processes):
                    workers.append(_Worker(number, store.port, world, function, arguments))
            _supervise(workers)
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.join()


def join_world(
    world: World,
    function: Callable[..., None],
    *arguments: Any,
    on_stuck: Callable[[str], object] = print,
) -> None:
    """Make this process a member of ``world``, call ``function``, and leave it again.

    Args:
        world: of which ``rank()`` says who this process is.
        function: called with ``arguments``.
        arguments: of the function.
        on_stuck: called in another thread, with the line that names a process that is stuck, just
            before this process ends.

    Raises:
        PeerLost: where an exchange with another process failed.
    """
    global _watchdog
    torch.set_num_threads(world.threads)
    if world.device_type == "cuda":
        torch.cuda.set_device(device_index())
    if world.processes == 1:
        return function(*arguments)
    store = rendezvous(world.processes)
    place, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    board = _c10d.TCPStore(place, port, wait_for_workers=False)  # another thread has its own
    board = _c10d.PrefixStore(f"watchdog {store.get('session').hex()}", board)
    with Watchdog(board, rank(), world.processes, on_stuck) as _watchdog:
        try:
            _init_process_group(world, store)
            if (signum := interrupts.requested()) is not None:
                raise Interrupted(signum)
            function(*arguments)
        except Exception as error:
            if is_lost_peer(error):
                who = _watchdog.who_left(lambda: interrupts.requested() is None)
                raise PeerLost(who) from error
            raise
    dist.destroy_process_group()


def _init_process_group(world: World, store: Any) -> None:
    gpu = world.device_type == "cuda"
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        store=_c10d.PrefixStore("groups", store),
        rank=rank(),
        world_size=world.processes,
        timeout=timedelta(seconds=STARTING),  # the watchdog notices earlier who is missing
        device_id=torch.device("cuda", device_index()) if gpu else None,
    )


@functools.cache
def rendezvous(processes: int) -> Any:
    """The store that all processes share, empty: a torch.distributed.Store; torchrun has one.

    torchrun gives a restarted world the store of the one before, with all that was written to it.
    So each process writes a name of its own there, and goes on once all have seen the same names.
    """
    store: Any
    store, _, _ = next(_c10d.rendezvous("env://", timeout=timedelta(seconds=_JOINING)))
    store = _c10d.PrefixStore(f"fastalex {processes}", store)
    store.set(f"name {rank()}", uuid.uuid4().hex)
    while True:
        names = "".join(
            receive(store, f"name {number}", f"waits for rank {number} to start", _JOINING)
            for number in range(processes)
        )
        store.set(f"seen {rank()}", names)
        if all(store.get(f"seen {number}").decode() == names for number in range(processes)):
            store = _c10d.PrefixStore(names, store)
            store.set("session", names)
            return store
        time.sleep(_LOOK)


def receive(store: Any, key: str, waiting: str, most: float = math.inf) -> str:
    """The text under ``key``, whenever it comes; ``waiting`` is said on stderr each minute.

    Raises:
        TrainingError: where it has not come after ``most`` seconds.
    """
    started = said = time.monotonic()
    while not store.check([key]):  # not store.wait, which warns when it has waited
        if time.monotonic() - started > most:
            raise TrainingError(f"rank {rank()} {waiting}, and gave up after {most:.0f} s")
        if time.monotonic() - said > _SAY:
            said = time.monotonic()
            seconds = f"for {said - started:.0f} s now"
            print(f"train: rank {rank()}: {waiting}, {seconds}", file=sys.stderr)
        time.sleep(_LOOK)
    return str(store.get(key).decode())


class _Worker:
    """A process of this machine's own world, and the pipe by which it says how it ended."""

    def __init__(
        self, number: int, port: int, world: World, function: Callable[..., None], arguments: Any
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.number = number
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

    def outcome(self) -> BaseException | None:
        """Why it ended: what it raised, or what says how it died; None where it ended well."""
        who = f"rank {self.number} (process {self.process.pid})"
        try:
            raised: BaseException | None = self.pipe.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode or 0
            if -code in interrupts.SIGNALS:
                return Interrupted(-code)
            return WorkerFailed(f"{who} {_describe_exit(code)}")
        if raised is None:
            self.process.join(_GRACE)
        if isinstance(raised, WorkerFailed) and raised.traceback:
            return WorkerFailed(f"{who} failed", raised.traceback)
        return raised


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


def _supervise(workers: list[_Worker]) -> None:
    """Wait until all have ended.

    Raises:
        TrainingError, WorkerFailed: what ended the first that failed by itself. That another lost
            the connection to it may be heard earlier, and is reported where nothing else comes.
        Interrupted: where a signal ended them.
    """
    waiting: dict[Any, _Worker] = {worker.pipe: worker for worker in workers}
    lost, told, signum, last = None, False, None, math.inf
    while waiting and time.monotonic() < last:
        for pipe in connection.wait(list(waiting), _LOOK):
            raised = waiting.pop(pipe).outcome()
            if isinstance(raised, Interrupted):
                signum = signum or raised.signum
            elif isinstance(raised, PeerLost):
                lost = lost or WorkerFailed(str(raised))
                last = min(last, time.monotonic() + _PEER_LOST_WAIT)
            elif raised is not None:
                raise raised
        signum = signum or interrupts.requested()
        if signum and not told:
            told, last = True, time.monotonic() + _GRACE
            for worker in waiting.values():
                os.kill(worker.process.pid or 0, signum)
    if signum:
        raise Interrupted(signum)
    if lost:
        raise lost


def _work(
    pipe: Any,
    parent: int,
    environment: dict[str, str],
    world: World,
    function: Callable[..., None],
    arguments: Any,
) -> None:
    """Be one process of the world, and say how it ended."""
    die_with_parent(parent)
    os.environ.update(environment)
    if sys.platform == "linux":
        # All processes are here, whatever the host's name resolves to.
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
    for signum in set(interrupts.SIGNALS) - {signal.SIGHUP}:
        # Once it has saved, for the launcher sends one more. Not SIG_IGN: that would throw away
        # one that came while this process was starting, and waits to be let through.
        signal.signal(signum, lambda *_: None)

    def on_stuck(line: str) -> None:
        pipe.send(WorkerFailed(line))

    raised: BaseException | None = None
    try:
        with interrupts.noticed():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupts.SIGNALS)
            join_world(world, function, *arguments, on_stuck=on_stuck)
    except (Interrupted, TrainingError) as error:
        raised = error
    except Exception:
        raised = WorkerFailed("", traceback.format_exc())
    pipe.send(raised)
    # Nothing is left to do, and threads of torch's that still run would abort an orderly exit.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


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
    with interrupts.blocked():
        yield
