"""Memory as a GPU without luck has it: exact bounds, no two programs on one element, any order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import gcd
from typing import Any

import numpy as np
import torch

from ._observe import Program, every_program

_NOBODY, _SEVERAL = -1, -2


class StrictError(AssertionError):
    """A kernel touched memory it must not touch, or in an order that nothing guarantees."""


class _Region:
    """A run of memory that one or more arguments of a launch share, counted in `unit` bytes."""

    def __init__(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        self.names = "/".join(name for name, _ in tensors)
        self.start = min(_extent(t)[0] for _, t in tensors)
        self.stop = max(_extent(t)[1] for _, t in tensors)
        self.unit = gcd(*(t.element_size() for _, t in tensors))
        units = (self.stop - self.start) // self.unit
        self.legal = np.zeros(units, bool)
        for _, t in tensors:
            self._allow(t)
        # Which program stored or loaded each unit; a load by a second program makes it _SEVERAL.
        self.stored = np.full(units, _NOBODY, np.int32)
        self.loaded = np.full(units, _NOBODY, np.int32)

    def _allow(self, t: torch.Tensor) -> None:
        """Mark each element of ``t``, and not what lies between them."""
        scale = t.element_size() // self.unit
        first = (t.data_ptr() - self.start) // self.unit
        strides = [s * scale for s in t.stride()]
        for part in range(scale):
            view = np.lib.stride_tricks.as_strided(self.legal[first + part :], t.shape, strides)
            view[...] = True

    def units(self, addresses: np.ndarray, size: int) -> np.ndarray:
        first = (addresses - np.uint64(self.start)).astype(np.int64) // self.unit
        scale = size // self.unit
        return first if scale == 1 else (first[:, None] + np.arange(scale)).reshape(-1)


def _extent(t: torch.Tensor) -> tuple[int, int]:
    """The bytes [start, stop) that the elements of ``t`` span."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


class Strict:
    """An observer of the interpreter that fails a launch for what would be luck on a GPU.

    * A load or store outside the elements of the tensors passed to the launch, also in the gaps
      of a strided one.
    * One at an address that its size does not divide, which a GPU refuses.
    * An element stored by two programs, or stored by one and loaded by another.
    * Two lanes of one store on one element.

    Args:
        seed: of the order in which programs run; None is the interpreter's own.
    """

    real_memory = True

    def __init__(self, seed: int | None = 0) -> None:
        self.seed = seed
        self.launches: list[str] = []
        self.programs = 0
        self._regions: list[_Region] = []
        self._starts = np.zeros(0, np.uint64)
        self._numbers: dict[Program, int] = {}

    def begin(self, kernel: str, arguments: dict[str, Any], grid: Program) -> Sequence[Program]:
        tensors = [(n, getattr(a, "base", a)) for n, a in arguments.items()]  # of a descriptor
        tensors = [(n, t) for n, t in tensors if isinstance(t, torch.Tensor) and t.numel()]
        tensors.sort(key=lambda named: named[1].data_ptr())
        groups: list[list[tuple[str, torch.Tensor]]] = []
        stop = 0
        for name, t in tensors:
            if groups and t.data_ptr() < stop:
                groups[-1].append((name, t))
            else:
                groups.append([(name, t)])
            stop = max(stop, _extent(t)[1])
        self._regions = [_Region(group) for group in groups]
        self._starts = np.array([r.start for r in self._regions], np.uint64)
        self.launches.append(kernel)
        order = every_program(grid)
        if self.seed is not None:
            random.Random(self.seed).shuffle(order)
        self._numbers = {program: i for i, program in enumerate(order)}
        self.programs += len(order)
        return order

    def access(self, kind: str, program: Program, addresses: np.ndarray, size: int) -> None:
        where = f"{self.launches[-1]}, program {program}: a {kind}"
        if (addresses % np.uint64(size)).any():
            raise StrictError(f"{where} of {size} bytes at an address that {size} does not divide")
        owners = np.searchsorted(self._starts, addresses, side="right") - 1
        for owner in np.unique(owners):
            chosen = addresses[owners == owner] if owners.min() != owners.max() else addresses
            region = self._regions[owner] if owner >= 0 else None
            if region is None or int(chosen.max()) + size > region.stop:
                raise StrictError(f"{where} outside of every argument, past {_name(region)}")
            units = region.units(chosen, size)
            if not region.legal[units].all():
                raise StrictError(f"{where} between the elements of {region.names}")
            self._check_race(kind, where, region, units, self._numbers[program])

    def _check_race(
        self, kind: str, where: str, region: _Region, units: np.ndarray, program: int
    ) -> None:
        stored, loaded = region.stored[units], region.loaded[units]
        if ((stored != _NOBODY) & (stored != program)).any():
            raise StrictError(f"{where} of what another program stores in {region.names}: a race")
        if kind == "load":
            region.loaded[units] = np.where(
                (loaded == _NOBODY) | (loaded == program), program, _SEVERAL
            )
            return
        if ((loaded != _NOBODY) & (loaded != program)).any():
            raise StrictError(f"{where} of what another program loads in {region.names}: a race")
        lanes = np.arange(units.size)
        last = np.empty_like(region.stored)
        last[units] = lanes
        if (last[units] != lanes).any():
            raise StrictError(f"{where} with two lanes on one element of {region.names}")
        region.stored[units] = program


def _name(region: _Region | None) -> str:
    return "the first" if region is None else region.names
