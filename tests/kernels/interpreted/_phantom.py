"""Run programs of a launch whose tensors are too large to exist; look at their addresses."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.runtime.interpreter as interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from fastalex_kernels.common.launch import interpret
from fastalex_kernels.common.program import Launch

from ._observe import Program, observe

_SPACING = 1 << 44  # bytes between two phantoms: no index of 32 bits leads from one into another


class Phantom:
    """A tensor's pointer, type and size without the tensor."""

    def __init__(self, like: torch.Tensor, number: int) -> None:
        last = sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
        self.dtype = like.dtype
        self.start = (number + 1) * _SPACING
        self.stop = self.start + (last + 1) * like.element_size()

    def data_ptr(self) -> int:
        return self.start


class _Addresses:
    """An observer that runs a few programs and holds every address to its tensor."""

    real_memory = False

    def __init__(self, programs: list[Program]) -> None:
        self.programs = programs
        self.reached: dict[str, int] = {}
        self._phantoms: dict[str, Phantom] = {}

    def begin(self, kernel: str, arguments: dict[str, Any], grid: Program) -> Sequence[Program]:
        bases = {name: getattr(a, "base", a) for name, a in arguments.items()}  # of a descriptor
        self._phantoms = {name: a for name, a in bases.items() if isinstance(a, Phantom)}
        return self.programs

    def access(self, kind: str, program: Program, addresses: np.ndarray, size: int) -> None:
        low, high = int(addresses.min()), int(addresses.max()) + size
        for name, phantom in self._phantoms.items():
            if phantom.start <= low and high <= phantom.stop:
                self.reached[name] = max(self.reached.get(name, 0), high - phantom.start)
                return
        raise AssertionError(f"program {program}: a {kind} from {low:#x} to {high:#x}, outside")


def _phantom(argument: Any, number: int) -> Any:
    if isinstance(argument, TensorDescriptor):
        return dataclasses.replace(argument, base=Phantom(argument.base, number))
    return Phantom(argument, number) if isinstance(argument, torch.Tensor) else argument


def corners(grid: tuple[int, ...], more: int = 2) -> list[Program]:
    """The first and the last program along each axis, and a few between."""
    sizes = (*grid, 1, 1)[:3]
    chosen = {tuple(0 if low else n - 1 for n in sizes) for low in (True, False)}
    draw = random.Random(0)
    chosen |= {tuple(draw.randrange(n) for n in sizes) for _ in range(more)}
    return sorted(chosen)  # type: ignore[arg-type]


@contextmanager
def _short_loops(kernel: Any, longest: int) -> Iterator[None]:
    """Cut run-time loops of ``kernel`` above ``longest`` to the first two turns and the last."""

    def shortened(*arguments: Any) -> list[int]:
        turns = range(*arguments)
        return [*turns] if len(turns) <= longest else [*turns[:2], turns[-1]]

    # Where the interpreted source looks up `range`: its own module's names, and those of the
    # modules whose functions it calls.
    modules = [vars(m) for n, m in sys.modules.items() if n.startswith("fastalex_kernels.")]
    places = [kernel.fn.__globals__, *(m for m in modules if m is not kernel.fn.__globals__)]
    for names in places:
        names["range"] = shortened
    try:
        yield
    finally:
        for names in places:
            del names["range"]


@contextmanager
def _overflow_checks() -> Iterator[None]:
    """Let the interpreter fail where an int32 sum or product wraps."""
    builder = interpreter.interpreter_builder
    saved, builder.options = builder.options, dataclasses.replace(builder.options, debug=True)
    try:
        yield
    finally:
        builder.options = saved


def run_corners(launch: Launch, longest_loop: int = 80) -> dict[str, int]:
    """Run a few programs of ``launch`` on phantoms; bytes reached from each argument's start.

    Of a loop with more turns than ``longest_loop`` only the first two and the last are taken.

    Raises:
        AssertionError: where an address leaves its tensor, or an int32 result wraps.
    """
    arguments = [_phantom(a, i) for i, a in enumerate(launch.arguments)]
    observer = _Addresses(corners(launch.grid))
    with _overflow_checks(), _short_loops(launch.kernel, longest_loop), observe(observer):
        interpret(launch.kernel, launch.grid, arguments, {})
    return observer.reached
