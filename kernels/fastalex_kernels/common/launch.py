"""The only place of the package that launches kernels: compiled, interpreted or recorded."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from ..common import backend

MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # along the axes of a grid
MOST_COUNTED = 2**31 - 2**24  # so that a block more than that still fits in 32 bits


class _Collecting(threading.local):
    program: Any = None  # what this thread's launches are added to, see program.py


_collecting = _Collecting()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, counted: int, **kwargs: Any) -> None:
    """Run ``kernel[grid]`` on the device of its first tensor; an empty grid is no launch.

    Args:
        kernel, grid, args, kwargs: as Triton takes them.
        counted: the largest number that the kernel counts to in 32 bits: of rows, mostly.

    Raises:
        ValueError: for more than the kernel can count, or more programs than a GPU starts.
    """
    if 0 in grid:
        return
    if counted > MOST_COUNTED or any(map(int.__gt__, grid, MOST_PROGRAMS)):
        raise ValueError(
            f"input: too large for one launch of {kernel.fn.__name__.strip('_')}, which would count"
            f" to {counted} and start {' x '.join(map(str, grid))} programs; the most are "
            f"{MOST_COUNTED} and {' x '.join(map(str, MOST_PROGRAMS))}, split the batch"
        )
    if _collecting.program is None:
        execute(kernel, grid, args, kwargs)
    else:
        _collecting.program.launch(kernel, grid, args, kwargs)


def withdraw() -> None:
    """Take the last launch, which failed, out of the program that is being recorded, if any."""
    if _collecting.program is not None:
        del _collecting.program.launches[-1:]


def execute(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a launch, or hand it to whoever records; returns what ``run`` does."""
    return (backend.recorder() or run)(kernel, grid, args, kwargs)


def run(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """What ``launch`` does where nobody records it; a recorder may call it.

    Returns:
        Triton's compiled kernel; None where it was interpreted.
    """
    first = next(a for a in args if isinstance(a, torch.Tensor))
    if isinstance(kernel, InterpretedFunction) or not first.is_cuda:
        return interpret(kernel, grid, args, kwargs)
    is_gpu = first.device.type == "cuda"
    with torch.cuda.device(first.device) if is_gpu else contextlib.nullcontext():
        return kernel[grid](*args, **kwargs)


_interpreting = threading.RLock()
_twins: dict[int, InterpretedFunction] = {}  # by id: hashing a kernel would parse what it calls


def _twin(kernel: Any) -> InterpretedFunction:
    if isinstance(kernel, InterpretedFunction):
        return kernel
    return _twins.setdefault(id(kernel), InterpretedFunction(kernel.fn))


def interpret(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Run a kernel in Triton's interpreter, whether it was imported to be compiled or not.

    The interpreter replaces parts of Triton's language while it runs, and a ``@triton.jit``
    function refuses to be called but by a compiler. Here all that is replaced for the time of one
    launch and put back, so that the process can compile afterwards; other threads wait for it.
    """
    if not isinstance(kernel, JITFunction | InterpretedFunction):
        kernel[grid](*args, **kwargs)  # somebody's own, which runs by itself
        return
    names = _twin(kernel).arg_names
    constants = {name: value for name, value in kwargs.items() if name in names}
    language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    functions = (JITFunction, InterpretedFunction)
    with _interpreting:
        called = [function.__call__ for function in functions]
        patched = interpreter._patch_lang(language)
        try:
            for function in functions:
                # What a kernel calls finds the language replaced already.
                function.__call__ = lambda self, *a, **k: _twin(self).rewrite()(*a, **k)
            _twin(kernel)[grid](*args, **constants)
        finally:
            for function, call in zip(functions, called, strict=True):
                function.__call__ = call
            patched.restore()


def collecting(program: Any) -> contextlib.AbstractContextManager[None]:
    """Let ``program`` collect this thread's launches and calls inside the ``with`` block."""
    return backend.replaced(_collecting, "program", program)


def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Call a function that writes its results into tensors that exist.

    It is part of the program that is being recorded, if one is: as a whole, whatever it launches.
    What it returns is not used.
    """
    program = _collecting.program
    with collecting(None):
        function(*arguments, **options)
    if program is not None:
        program.add(function, None, arguments, options)
