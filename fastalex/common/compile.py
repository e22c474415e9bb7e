"""Compile kernels before they are launched, for a GPU that need not be here, on all cores.

A kernel is compiled by Triton's own launcher, warmed up instead of run, so that it specialises as
on a GPU: on pointers and integers divisible by 16 and on integers equal to 1.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastalex_kernels.common.backend import interpreted, record_launches
from fastalex_kernels.common.program import Launch


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and the bytes of shared memory (AMD: LDS) that a program can have."""

    gpu: GPUTarget
    shared_limit: int


# Of compute capability 8.7 (Orin) and 12.1 (GB10) no GPU is in gpus.py, but runs compile for them.
_SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}  # KB
TARGETS = {
    f"sm_{arch}": Target(GPUTarget("cuda", arch, 32), size << 10) for arch, size in _SHARED.items()
} | {"gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10)}


@triton.jit  # type: ignore[untyped-decorator]
def _probe() -> None:
    pass


class _AbsentGPU(NamedTuple):
    """What a launcher asks of a driver before it compiles; nothing is ever run through it."""

    name: str

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name].gpu

    def get_current_device(self) -> str:
        return f"offline {self.name}"  # the key of a kernel's cache: one for each target

    def get_current_stream(self, device: Any = None) -> int:
        return 0


def _check(target: str) -> None:
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")


@contextlib.contextmanager
def fake_driver(target: str) -> Iterator[None]:
    """Make ``target`` the current GPU of Triton inside the ``with`` block."""
    _check(target)
    previous = driver._active  # not driver.active, which looks for a real GPU where there is none
    driver.set_active(_AbsentGPU(target))
    try:
        yield
    finally:
        driver.set_active(previous)


def without_data(launch: Launch, storages: dict[int, torch.UntypedStorage]) -> Launch:
    """The launch on meta tensors of the same shapes, strides, alignment and shared memory.

    ``storages`` are those of the launches before, by what each stands for; this one's are added.
    """

    def bare(x: Any) -> Any:
        if hasattr(x, "base"):  # a descriptor, Triton's or Gluon's
            return replace(x, base=bare(x.base))
        if not isinstance(x, torch.Tensor):
            return x
        given = x.untyped_storage()
        empty = torch.empty(given.nbytes(), dtype=torch.uint8, device="meta")
        storage = storages.setdefault(given._cdata, empty.untyped_storage())
        view = torch.empty(0, dtype=x.dtype, device="meta")
        return view.set_(storage, x.storage_offset(), x.shape, x.stride())

    return replace(launch, arguments=list(map(bare, launch.arguments)))


def record(target: str, step: Callable[[], object]) -> list[Launch]:
    """Every launch that ``step()`` would make on ``target``, in order.

    ``step`` runs on fake tensors: those it creates take no memory and hold no values, whatever
    their size, and no kernel runs.

    Args:
        target: one of ``TARGETS``.
        step: creates its tensors on the default device, then calls functions of
            ``fastalex_kernels`` (or a model made of them), backward too.
    """
    _check(target)
    recorded: list[Launch] = []

    def recorder(*launch: Any) -> None:
        recorded.append(Launch.of("", "", *launch))

    with FakeTensorMode(allow_non_fake_inputs=True), record_launches(target, recorder):
        step()
    storages: dict[int, torch.UntypedStorage] = {}
    return [without_data(launch, storages) for launch in recorded]


def check_target(target: str) -> None:
    """Raise a ValueError where the installed Triton can't compile for ``target``, or interprets."""
    if interpreted():
        raise ValueError("TRITON_INTERPRET=1 is set: an interpreted kernel has no machine code")
    try:
        compile_launch(Launch.of("", "", _probe, (1,), (), {}), target)
    except Exception as error:  # each version has its own, from a KeyError to ptxas's message
        raise ValueError(
            f"triton {triton.__version__} can't compile for {target}: {first_line(error)}"
        ) from error


def compile_launch(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel; one object for launches that run the same machine code."""
    if interpreted():
        raise ValueError("offline: the kernels were imported under TRITON_INTERPRET=1, unset it")
    with fake_driver(target):
        return launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)


class Compiled(NamedTuple):
    """What became of a job of ``compile_ahead``."""

    failure: str | None  # why it should not run
    seconds: float  # of a processor that it took; next to none from Triton's cache


def _compiles(launch: Launch, target: str) -> None:
    compile_launch(launch, target)


def compile_ahead(
    jobs: Sequence[Sequence[Launch]],
    target: str,
    judge: Callable[[Launch, str], str | None] = _compiles,
) -> Iterator[Compiled]:
    """Compile jobs of launches in as many processes as there are cores.

    They leave what they compile in Triton's cache, from where ``compile_launch`` reads it.

    Args:
        jobs: of launches on tensors without data.
        target: as ``fake_driver`` takes it.
        judge: compiles a launch, and says why it should not be made.

    Yields:
        What became of each job, in order.
    """
    if not jobs:
        return
    workers = min(len(os.sched_getaffinity(0)), len(jobs))
    context = multiprocessing.get_context("fork")  # which hands the jobs on as they are
    with context.Pool(workers, _start, (jobs, target, judge)) as pool:
        yield from pool.imap(_compile, range(len(jobs)))


_given: tuple[Any, ...]  # to a process that compiles


def _start(*given: Any) -> None:
    global _given
    _given = given
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # a run only notes them
        signal.signal(signum, signal.SIG_DFL)
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")


def _compile(number: int) -> Compiled:
    jobs, target, judge = _given
    start, why = sum(os.times()[:4]), None  # with the children's
    try:
        why = next(filter(None, [judge(launch, target) for launch in jobs[number]]), None)
    except Exception as error:  # of any kind: whoever asked decides what a failure means
        why = first_line(error)
    return Compiled(why, sum(os.times()[:4]) - start)


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
