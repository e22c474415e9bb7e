"""Stand between Triton's interpreter and memory, and decide the order of a launch's programs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter

from fastalex_kernels.common.launch import interpret

Program = tuple[int, int, int]
_run = interpreter.GridExecutor.__call__


class Interpreted:
    """A ``@triton.jit`` function of a test, of which ``kernel[grid](...)`` is interpreted."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: interpret(self.kernel, grid, args, kwargs)


class Observer(Protocol):
    """What ``observe`` tells about each launch.

    Attributes:
        real_memory: False where arguments stand for memory that does not exist: nothing is
            loaded or stored, a load yields its ``other`` or zeros.
    """

    real_memory: bool

    def begin(self, kernel: str, arguments: dict[str, Any], grid: Program) -> Sequence[Program]:
        """A launch begins; answer which programs run, in which order."""

    def access(self, kind: str, program: Program, addresses: np.ndarray, size: int) -> None:
        """``program`` is about to touch ``size`` bytes at each address: a "load" or "store"."""


@contextlib.contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Show every launch of the interpreter to ``observer`` inside the ``with`` block.

    An inner block takes the place of an outer one.
    """
    builder = interpreter.interpreter_builder
    plain = type(builder)
    order: list[Program] = []

    def seen(kind: str, pointers: Any, mask: Any) -> Any:
        lanes, chosen = np.broadcast_arrays(pointers.data, mask.data)
        if chosen.any():
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            observer.access(kind, builder.grid_idx, lanes[chosen].reshape(-1), size)
        if observer.real_memory:
            return mask
        return interpreter.TensorHandle(np.zeros_like(mask.data), tl.int1)

    def load(pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        mask = seen("load", pointers, mask)
        return plain.create_masked_load(builder, pointers, mask, *rest, **options)

    def store(pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        mask = seen("store", pointers, mask)
        return plain.create_masked_store(builder, pointers, value, mask, *rest, **options)

    def atomic(*_: Any) -> Any:
        raise AssertionError("an atomic: its result depends on the order of the programs")

    def set_grid_dim(*_: int) -> None:
        pass  # the real one is set at the launch; the interpreter counts through `order`

    def set_grid_idx(index: int, *_: int) -> None:
        plain.set_grid_idx(builder, *order[index])

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        grid = (*executor.grid, 1, 1)[:3]
        named = {**dict(zip(executor.arg_names, args, strict=False)), **kwargs}
        order[:] = observer.begin(executor.fn.__name__, named, grid)
        plain.set_grid_dim(builder, *grid)
        executor.grid = (len(order),)
        _run(executor, *args, **kwargs)

    hooks = {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": atomic,
        "create_atomic_cas": atomic,
        "set_grid_dim": set_grid_dim,
        "set_grid_idx": set_grid_idx,
    }
    knobs = triton.knobs.compilation
    with contextlib.ExitStack() as undo:
        undo.callback(vars(builder).update, dict(vars(builder)))
        undo.callback(lambda: [delattr(builder, name) for name in hooks])
        vars(builder).update(hooks)  # of the instance: the class keeps the plain ones
        undo.callback(
            setattr, interpreter.GridExecutor, "__call__", interpreter.GridExecutor.__call__
        )
        interpreter.GridExecutor.__call__ = launch
        undo.callback(setattr, knobs, "front_end_debugging", knobs.front_end_debugging)
        knobs.front_end_debugging = True  # errors come out as they are
        if not observer.real_memory:
            undo.enter_context(_arguments_as_they_are())
        yield


@contextlib.contextmanager
def _arguments_as_they_are() -> Iterator[None]:
    """Let the interpreter take pointers that no storage stands behind."""
    executor = interpreter.GridExecutor
    saved = executor._init_args_hst, executor._restore_args_dev
    executor._init_args_hst = lambda _, args, kwargs: (list(args), kwargs)
    executor._restore_args_dev = lambda *_: None
    try:
        yield
    finally:
        executor._init_args_hst, executor._restore_args_dev = saved


def every_program(grid: Program) -> list[Program]:
    return list(itertools.product(*map(range, grid)))
