"""Which backend runs a function of this package, and the GPU that its launches are chosen for.

Importing this module asks no driver anything; a target is looked up at the first launch on it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

_PACKAGE = __name__.split(".")[0]
_NAMESPACE = "fastalex" if _PACKAGE == "fastalex_kernels" else _PACKAGE
BACKENDS = ("auto", "triton", "aten", "interpreter")
_OLDEST = 80  # sm_80: what Triton supports, and has tensor cores for bfloat16
TRITON = tuple(int(n) for n in triton.__version__.split(".")[:2])
INTERPRETED_AT_IMPORT: bool = triton.knobs.runtime.interpret  # by TRITON_INTERPRET=1

# Takes kernel, grid, arguments and options of a launch, in place of the GPU.
Recorder = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], Any]


class _Choice(threading.local):
    """What is chosen in this thread; torch.compile guards on it, as on no context variable."""

    def __init__(self) -> None:
        self.name = "auto"
        self.recorder: tuple[str, Recorder] | None = None  # with the target that it stands for


_choice = _Choice()


@contextlib.contextmanager
def replaced(holder: object, name: str, value: object) -> Iterator[None]:
    """Set an attribute inside the ``with`` block."""
    previous = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, previous)


def backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Choose what runs the functions of this package inside the ``with`` block, in this thread.

    Args:
        name: ``"auto"``, Triton on a GPU that is not ``too_old`` and under
            ``TRITON_INTERPRET=1``, ATen otherwise;
            ``"triton"``, Triton or an error; ``"aten"``, torch's own operators (oneDNN, cuDNN);
            ``"interpreter"``, Triton's interpreter, which is slow, on CPU tensors.

    Raises:
        ValueError: for another name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return replaced(_choice, "name", name)


def record_launches(
    target_name: str, recorder: Recorder
) -> contextlib.AbstractContextManager[None]:
    """Hand this thread's launches to ``recorder(kernel, grid, args, kwargs)`` as on a target.

    ``target`` answers with ``target_name`` meanwhile. Offline compilation and the roofline report
    read every launch of a step this way.
    """
    return replaced(_choice, "recorder", (target_name, recorder))


def chosen() -> str:
    """The backend that this thread chose: one of ``BACKENDS``."""
    return _choice.name


def recorder() -> Recorder | None:
    """Who takes this thread's launches, if they are recorded."""
    return None if _choice.recorder is None else _choice.recorder[1]


def interpreted() -> bool:
    """Whether launches are interpreted here: their blocks are chosen for the interpreter."""
    if _choice.recorder is not None:
        return _choice.recorder[0] == "interpreter"
    return _choice.name == "interpreter" or INTERPRETED_AT_IMPORT


def use_triton(x: Tensor) -> bool:
    """Whether an operation on ``x`` runs as Triton kernels here; float64 never does."""
    name = _choice.name
    if name == "aten" or x.dtype == torch.float64:
        return False
    if x.is_cuda and name == "auto" and too_old(x.device.index):
        return False
    here = x.is_cuda or _choice.recorder is not None or interpreted()
    if name == "triton" and not here:
        raise ValueError(
            f"backend 'triton' needs a GPU tensor or TRITON_INTERPRET=1, got a tensor on {x.device}"
        )
    if name == "interpreter" and x.is_cuda:
        raise ValueError(f"backend 'interpreter' needs a CPU tensor, got one on {x.device}")
    return here


def too_old(index: int | None) -> str | None:
    """Why a GPU runs torch's operators, in one line, if Triton does not support it."""
    if torch.version.hip or not torch.cuda.is_initialized():  # nothing is there but to be traced
        return None
    name, gpu = _gpu_at(torch.cuda.current_device() if index is None else index)
    found = int(name.removeprefix("sm_"))
    if found >= _OLDEST:
        return None
    return (
        f"{gpu} has compute capability {found / 10}: it runs torch's operators, "
        f"Triton's kernels need {_OLDEST / 10}"
    )


# What torch.compiler.assume_constant_result does, which would import the compiler.
too_old._dynamo_marked_constant = True  # type: ignore[attr-defined]


def target(device: torch.device) -> str:
    """The name tiles are chosen by: ``"sm_90"``, ``"gfx942"``, ... or ``"interpreter"``."""
    return _gpu(device)[0] if _choice.recorder is None else _choice.recorder[0]


def device_name(device: torch.device) -> str | None:
    """The GPU's name, or ``"interpreter"``; None where launches are recorded."""
    return _gpu(device)[1] if _choice.recorder is None else None


def _gpu(device: torch.device) -> tuple[str, str]:
    if interpreted() or (device.type == "cpu" and not torch.cuda.is_available()):
        return "interpreter", "interpreter"
    return _gpu_at(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _gpu_at(index: int) -> tuple[str, str]:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0], properties.name
    return f"sm_{properties.major}{properties.minor}", properties.name


def gluon_mode() -> str:
    """Whether kernels in Gluon run: ``"never"``, or their first launch may take long: ``"wait"``.

    Raises:
        ValueError: for another value of ``FASTALEX_GLUON``, but none.
    """
    value = os.environ.get("FASTALEX_GLUON", "")
    if value not in ("", "never", "wait"):
        raise ValueError(f"FASTALEX_GLUON: expected never or wait, got {value!r}")
    return value


def has_tma(device: torch.device) -> bool:
    """Whether kernels fetch blocks by tensor descriptors there, through the TMA unit."""
    return target(device) in ("sm_90", "sm_100", "sm_103")


def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start there while the one before it still ends; see dependent.py."""
    name = target(device)
    return name.startswith("sm_") and int(name.removeprefix("sm_")) >= 90


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register an implementation as torch's operator ``fastalex::name``, for eager and compiled.

    Where a build for the Kernel Hub is loaded, its id stands for ``fastalex``.

    Its ``register_fake`` says what comes out of tensors without data. While launches are recorded
    the implementation itself runs on those tensors, as launches need none; not where torch.compile
    traces, whose graph launches them later.

    On CPU tensors an implementation is interpreted, wherever it is called: the backward of what
    ran inside ``with backend("interpreter")`` may be called outside.
    """

    def register(implementation: Callable[..., Any]) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            x = next(a for a in args if isinstance(a, Tensor))
            if x.is_cuda or interpreted() or _choice.recorder is not None:
                return implementation(*args, **kwargs)
            with backend("interpreter"):
                return implementation(*args, **kwargs)

        schema = torch.library.infer_schema(implementation, mutates_args=())
        registered = torch.library.custom_op(
            f"{_NAMESPACE}::{name}", run, mutates_args=(), schema=schema
        )
        register_fake = registered.register_fake

        def fake(shapes: Callable[..., Any]) -> None:
            def outcome(*args: Any, **kwargs: Any) -> Any:
                traced = torch._guards.TracingContext.try_get() is not None
                chosen = shapes if traced or _choice.recorder is None else implementation
                return chosen(*args, **kwargs)

            register_fake(outcome)

        registered.register_fake = fake  # type: ignore[method-assign, assignment]
        return registered

    return register
