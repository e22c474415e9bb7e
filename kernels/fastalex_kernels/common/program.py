"""A step as a list of launches in which everything is decided.

A ``Program`` is recorded while the code that decides runs for the first time: each kernel launch
and each call of torch's joins the list with the very tensors it was given. From then on ``run``
only goes through the list: no tile is looked up, no shape computed, no memory allocated, no tensor
descriptor made.

What may change from run to run are the inputs. Everything else is memory that the first run
allocated and that the list holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.runtime.driver import driver

from ..common.backend import has_dependent_launch
from ..common.launch import collecting, execute

Run = Callable[[int], object]  # with the handle of a stream, 0 where there is none


@dataclass(eq=False)
class Launch:
    """One launch of a kernel, or one call of a function of torch's.

    Attributes:
        layer: whose it is: ``"conv1"``.
        phase: of which pass: ``"forward"`` or ``"backward"``; ``pass`` is a keyword of Python's.
        kernel: the ``@triton.jit`` function, or the function that is called.
        grid: programs along up to three axes; None for a call.
        arguments: positional, as the kernel takes them; what a constexpr is, too.
        options: of a launch ``num_warps``, ``num_stages`` and ``launch_pdl``, of a call its keyword
            arguments.
    """

    layer: str
    phase: str
    kernel: Any
    grid: tuple[int, ...] | None
    arguments: list[Any]
    options: dict[str, Any]
    run: Run = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.run = self._call if self.grid is None else self._launch

    @classmethod
    def of(
        cls,
        layer: str,
        phase: str,
        kernel: Any,
        grid: tuple[int, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Launch:
        """``kernel[grid](*args, **kwargs)`` as a launch."""
        names = kernel.arg_names
        options = {**dict(zip(names, args, strict=False)), **kwargs}
        arguments = [options.pop(name) for name in names]
        return cls(layer, phase, kernel, grid, arguments, options)

    @property
    def name(self) -> str:
        """The kernel's name, or the function's."""
        function = getattr(self.kernel, "fn", self.kernel)
        return str(getattr(function, "__qualname__", function))

    @property
    def starts_early(self) -> bool:
        """Whether it starts while the launch before it still ends; see dependent.py."""
        return self.grid is not None and bool(self.options.get("launch_pdl"))

    @property
    def named(self) -> dict[str, Any]:
        """A kernel's arguments by their names, constexprs too."""
        return dict(zip(self.kernel.arg_names, self.arguments, strict=True))

    def _launch(self, stream: int) -> None:
        assert self.grid is not None
        arguments = self.arguments
        compiled = execute(self.kernel, self.grid, tuple(arguments), self.options)
        if hasattr(compiled, "__getitem__"):  # as it is, Triton looks up and specialises nothing
            start = compiled[(*self.grid, 1, 1)[:3]]
            self.run = lambda stream: start(*arguments, stream=stream)

    def _call(self, stream: int) -> None:
        self.kernel(*self.arguments, **self.options)


def tensor_of(argument: Any) -> torch.Tensor | None:
    """The tensor behind a kernel's argument, None where it is a number."""
    argument = getattr(argument, "base", argument)  # of a descriptor, Triton's or Gluon's
    return argument if isinstance(argument, torch.Tensor) else None


class Program:
    """The launches of a step in order, for inputs of one shape.

    Args:
        inputs: the tensors that ``run`` may be given others for.
        dependent: whether a launch may start early, where the GPU can do it: see dependent.py.
        after_torch: whether the first one may, too: operators of torch's are before it.
    """

    def __init__(
        self,
        inputs: Sequence[torch.Tensor | None],
        dependent: bool = True,
        after_torch: bool = False,
    ) -> None:
        self.launches: list[Launch] = []
        self.inputs = list(inputs)
        self._reads: list[tuple[int, list[Any], int]] = []  # input, arguments, index
        self._device = next(x.device for x in inputs if x is not None)
        self._dependent = dependent and has_dependent_launch(self._device)
        self._after_torch = after_torch
        self._at = ("step", "forward")

    @contextlib.contextmanager
    def recording(self) -> Iterator[Program]:
        """Collect what runs inside the ``with`` block."""
        with collecting(self):
            yield self
        self._reads = [
            (number, launch.arguments, index)
            for launch in self.launches
            for index, argument in enumerate(launch.arguments)
            for number, x in enumerate(self.inputs)
            if x is not None and argument is x
        ]

    def at(self, layer: str, phase: str) -> None:
        """Say whose launches follow."""
        self._at = (layer, phase)

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Run a launch and add it; see ``launch.launch``."""
        last = self.launches[-1].grid is not None if self.launches else self._after_torch
        if self._dependent and last:
            kwargs = {**kwargs, "launch_pdl": True}
        self.launches.append(Launch.of(*self._at, kernel, grid, args, kwargs))
        self.launches[-1].run(0)

    def add(
        self,
        function: Callable[..., Any],
        grid: tuple[int, ...] | None,
        arguments: Sequence[Any],
        options: dict[str, Any],
    ) -> None:
        """Add a launch, or a call where ``grid`` is None, without running it."""
        self.launches.append(Launch(*self._at, function, grid, list(arguments), options))

    def set_inputs(self, inputs: Sequence[torch.Tensor | None]) -> None:
        """Read ``inputs``, of the recorded ones' shapes, strides and dtypes, from now on."""
        for number, arguments, index in self._reads:
            arguments[index] = inputs[number]

    def run(self, inputs: Sequence[torch.Tensor | None] | None = None) -> None:
        """Go through the launches, on the device's current stream; with other inputs if given."""
        if inputs is not None:
            self.set_inputs(inputs)
        if self._device.type != "cuda":
            self._run(0)
            return
        with torch.cuda.device(self._device):
            gpu = driver.active
            self._run(gpu.get_current_stream(gpu.get_current_device()))

    def _run(self, stream: int) -> None:
        for launch in self.launches:
            launch.run(stream)
