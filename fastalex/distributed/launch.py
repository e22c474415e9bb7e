"""Where the processes of a run come from, and how they meet.

``start`` gives each process of this machine the environment that torchrun would; torchrun itself is
for several machines. No process outlives its launcher: each asks the kernel to be killed when that
dies. Ours meet on loopback, and nothing that comes from a socket is unpickled.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastalex.common import interrupts
from fastalex.common.interrupts import Interrupted
from fastalex.distributed.watchdog import STARTING, Watchdog
from fastalex.distributed.world import World, device_index, rank, world_size

_PR_SET_PDEATHSIG = 1
_LOOPBACK = "127.0.0.1"
_PARENT = "FASTALEX_LAUNCHER"  # in a process's environment: the number of the one that started it
_LOOK = 0.1  # seconds between two looks at what others did
_GRACE = 30.0  # seconds that processes have to save and to end after a signal
_LOST = 20.0  # seconds in which the others of a process that failed notice it
_SAY = 60.0  # seconds between two lines of a process that waits
_JOINING = 600.0  # seconds in which every process has to start

_c10d: Any = dist  # exports its stores without saying so to a type checker


class TrainingError(RuntimeError):
    """A run can't go on, for a reason that the user can act on; the message is for the user."""

    def __init__(self, message: str, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere  # whether all processes of the run raise it alike


class PeerLost(TrainingError):
    """The process at the other end of an exchange is gone, for a reason that it may tell."""


def start(command: Sequence[str], processes: int) -> int:
    """Run ``command`` in ``processes`` processes of this machine, with torchrun's environment.

    The first signal that asks this process to end is handed on to them. They have ``_GRACE``
    seconds to end then, ``_LOST`` where one of them failed, and no time after a second signal.

    Returns:
        The exit code of the first that failed, 1 where it was killed; 0 where all ended well.

    Raises:
        Interrupted: where a signal asked for the end and some did not end in time.
    """
    store = _serve()
    environment = {
        **os.environ,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": _LOOPBACK,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 is not to make another one
        _PARENT: str(os.getpid()),
    }
    if sys.platform == "linux":  # all processes are here, whatever the host's name resolves to
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            environment.setdefault(name, "lo")
    workers: list[subprocess.Popen[bytes]] = []
    with interrupts.noticed():
        try:
            with interrupts.blocked():  # by them too, until they are ready for signals
                for number in range(processes):
                    place = {"RANK": str(number), "LOCAL_RANK": str(number)}
                    workers.append(subprocess.Popen(command, env={**environment, **place}))
            return _supervise(workers)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()


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


def _supervise(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    running, code, told, last = dict(enumerate(workers)), 0, False, math.inf
    while running and time.monotonic() < last:
        time.sleep(_LOOK)
        for number, worker in list(running.items()):
            if worker.poll() is None:
                continue
            del running[number]
            code = code or (worker.returncode if worker.returncode >= 0 else 1)
            if worker.returncode < 0:
                _say_killed(f"rank {number} (process {worker.pid})", -worker.returncode)
        signum = interrupts.requested()
        if signum and not told:
            told, last = True, time.monotonic() + _GRACE
            for worker in running.values():
                worker.send_signal(signum)
        elif code:
            last = min(last, time.monotonic() + _LOST)
    if running and signum:
        raise Interrupted(signum, "; run the same command again to go on")
    return code


def _say_killed(who: str, signum: int) -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)  # its progress bar
    hint = " (the system does that when memory runs out)" if signum == signal.SIGKILL else ""
    print(
        f"train: error: {who} was killed by {signal.Signals(signum).name}{hint}",
        file=sys.stderr,
        flush=True,
    )


def greet_launcher() -> None:
    """Let through the signals that ours held back, and die when it does (Linux only)."""
    ours = os.environ.get(_PARENT)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupts.SIGNALS)
    if sys.platform == "linux" and (ours or "TORCHELASTIC_RUN_ID" in os.environ):
        parent = int(ours or os.getppid())
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the kernel was asked
            os._exit(1)


def rendezvous() -> Any:
    """The store that all processes share, empty: a torch.distributed.Store; None for one alone.

    torchrun gives a restarted world the store of the one before, with all that was written to it.
    So each process writes a name of its own there, and goes on once all have seen the same names.

    Raises:
        TrainingError: where a process does not come, or the store is gone.
    """
    processes = world_size()
    if processes == 1:
        return None
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
    """The text under ``key``, whenever it comes; ``waiting`` is said on stderr each minute."""
    started = said = time.monotonic()
    while not store.check([key]):  # not store.wait, which warns when it has waited
        now = time.monotonic()
        if now - started > most:
            raise TrainingError(f"{waiting}, and gave up after {most:.0f} s")
        if now - said > _SAY:
            said = now
            line = f"train: rank {rank()}: {waiting}, for {now - started:.0f} s now"
            print(line, file=sys.stderr, flush=True)
        time.sleep(_LOOK)
    return str(store.get(key).decode())


def join_world(
    world: World,
    store: Any,
    function: Callable[[Watchdog | None], None],
    on_stuck: Callable[[str], object],
) -> None:
    """Make this process a member of ``world``, call ``function``, and leave it again.

    Args:
        world: of which ``rank()`` says who this process is.
        store: from ``rendezvous``.
        function: gets what tells the others of this process's progress; None where it is alone.
        on_stuck: called in another thread, with the line that names a process that is stuck, just
            before this process ends; with an empty line where it is for another one to say.

    Raises:
        PeerLost: where an exchange with another process failed.
    """
    torch.set_num_threads(world.threads)
    if world.device_type == "cuda":
        torch.cuda.set_device(device_index())
    if world.processes == 1:
        return function(None)
    place, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    board = _c10d.TCPStore(place, port, wait_for_workers=False)  # another thread has its own
    board = _c10d.PrefixStore(f"watchdog {store.get('session').decode()}", board)
    with Watchdog(board, rank(), world.processes, on_stuck) as watchdog:
        try:
            _init_process_group(world, store)
            if (signum := interrupts.requested()) is not None:
                raise Interrupted(signum)
            function(watchdog)
        except Exception as error:
            if is_lost_peer(error):
                who = watchdog.who_left(lambda: interrupts.requested() is None)
                raise PeerLost(who, everywhere=not who) from error
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


def is_lost_peer(error: Exception) -> bool:
    """Whether an operation failed because a process at its other end is gone."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "gloo" in text or "connection closed by peer" in text or "connection reset" in text
    )
