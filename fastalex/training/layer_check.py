"""A layer's kernels beside float64, and their time beside ATen's, on the data of a step.

Each pass runs twice, into memory that was filled with NaN. Its results have to be the same bits
both times, and float64's on the same rounded inputs, within the bounds of TOLERANCES.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastalex.common.timing import Clock, take_turns
from fastalex.distributed.launch import TrainingError
from fastalex.model.layers import LinearReLUDropout
from fastalex.training.layer_reference import (
    as_parameter,
    both_halves,
    expected_gradients,
    expected_output,
    one_maximum,
    own_half,
)
from fastalex.training.passes import Convolution, FullyConnected, Gradient, Pass, Pool
from fastalex.training.updates import StoredGradients
from fastalex_kernels.common.backend import chosen
from fastalex_kernels.common.program import Launch, Program, tensor_of
from fastalex_kernels.common.tuned import dot_precision
from fastalex_kernels.momentum import MomentumUpdate
from fastalex_kernels.reference import relative_error, tolerance

Tensor = torch.Tensor

REPORT = "please report it with the output of python -m fastalex.doctor --json"
_SUMMED = ("sums of the input's gradient",)  # partials, of which only the total is known
_ROUNDS = 10  # that a layer is timed
_MARGIN = 0.05  # of time, by which ATen has to be faster


class UnusableGPU(TrainingError):
    """A kernel left the GPU in an error that stays; the message names it."""


class NotChecked(RuntimeError):
    """The kernels can't be checked now; the message says why."""


@dataclass
class Verdict:
    """What the check found of a layer.

    Attributes:
        error, allowed: of the result that was closest to its bound, or past it.
        wrong: what is wrong, naming the kernel; None where all is right.
        ours, aten: seconds of both passes; None where they were not timed.
    """

    error: float = 0.0
    allowed: float = 0.0
    wrong: str | None = None
    ours: float | None = None
    aten: float | None = None

    def add(self, error: float, allowed: float) -> bool:
        """Take in a result; whether it is right."""
        if not error * self.allowed <= self.error * allowed or self.allowed == 0:
            self.error, self.allowed = error, allowed
        return error <= allowed  # NaN is not

    @property
    def slow(self) -> bool:
        timed = self.ours is not None and self.aten is not None
        return timed and self.aten < (1 - _MARGIN) * self.ours  # type: ignore[operator]

    @property
    def reason(self) -> str:
        """Why a step does without the kernels."""
        if self.wrong:
            return f"as its kernels are wrong here: {self.wrong}; {REPORT}"
        assert self.ours is not None
        assert self.aten is not None
        return f"which takes {1e6 * self.aten:.0f} us here, its kernels {1e6 * self.ours:.0f}"

    @property
    def uses(self) -> str:
        """The backend of the layer in a step; ``backend("triton")`` takes a slow kernel too."""
        return "aten" if self.wrong or (self.slow and chosen() != "triton") else "triton"


def has_kernels(one: Pass) -> bool:
    """Whether a pass is one of kernels, and not of torch's operators."""
    return isinstance(one, (Convolution, Pool, FullyConnected))


class Check:
    """Runs of kernels beside what they should come to.

    Args:
        name: of the layer.
        verdict: is filled in.
    """

    def __init__(self, name: str, verdict: Verdict) -> None:
        self.name, self.verdict = name, verdict
        self.programs: list[Program] = []  # of passes that ran
        self.made: list[Tensor | None] = []

    def run(
        self,
        phase: str,
        make: Callable[[], Sequence[Tensor | None]],
        restore: Callable[[], None] = lambda: None,
        *inputs: Tensor | None,
    ) -> list[Tensor | None]:
        """The results of a pass, which two runs have to agree on; none where it fails.

        Args:
            phase: ``"forward"`` or ``"backward"``.
            make: launches the kernels.
            restore: undoes what they change in place.
            inputs: of them.
        """
        program = self._program = Program(inputs)
        program.at(self.name, phase)
        try:
            restore()
            with _poisoned_memory(), program.recording():
                self.made = list(make())
            first = [None if x is None else x.clone() for x in self.made]
            restore()
            program.run()
            for one, other in zip(first, self.made, strict=True):
                if one is not None and other is not None and not _same_bits(one, other):
                    self.condemn(phase, f"two runs on the same data differ, by {self._by(other)}")
            restore()
        except torch.OutOfMemoryError:  # which says nothing of the kernels
            raise
        except Exception as error:  # of any kind: a kernel that fails is named, and left out
            names = ", ".join(dict.fromkeys(x.name for x in program.launches)) or "a launch"
            first_line = (str(error).strip().splitlines() or [""])[0]
            self.condemn(phase, f"{names}: {type(error).__name__}: {first_line}")
            _check_gpu(names)
            return []
        self.programs.append(program)
        return first

    def hold(
        self, phase: str, found: list[Tensor | None], expected: Mapping[str, tuple[Tensor, float]]
    ) -> None:
        """Compare the results of ``run`` with float64's, by name and each with its bound."""
        right, failed = [], []
        results = zip(found, self.made, expected.items(), strict=bool(found))
        for x, made, (what, (wanted, bound)) in results if found else ():
            if x is None or made is None:
                continue
            if not bool(wanted.isfinite().all()):
                raise NotChecked(f"{self.name}: a result is not finite in float64 either")
            x = x.flatten(0, -2).sum(0, dtype=torch.float64) if what in _SUMMED else x
            error = relative_error(x.sum() if wanted.dim() == 0 else x, wanted)
            if self.verdict.add(error, bound):
                right.append(made)
            else:
                failed.append((made, f"{what} {error:.1e} from float64, allowed {bound:.1e}"))
        if failed:
            made, why = failed[0]
            self.condemn(phase, f"{why}, by {self._by(made, right)}")

    def condemn(self, phase: str, why: str) -> None:
        """Note what is wrong, unless something was before."""
        self.verdict.wrong = self.verdict.wrong or f"{phase}: {why}"

    def _by(self, wrong: Tensor, right: Sequence[Tensor] = ()) -> str:
        """The kernels of the last run that ``wrong`` depends on, and no ``right`` result."""
        kernels = [x for x in self._program.launches if x.grid is not None]
        behind = {_memory(wrong)}
        upstream: list[Launch] = []
        given = {_memory(x) for x in self._program.inputs if x is not None}
        for launch in reversed(kernels):
            touched = {_memory(x) for x in map(tensor_of, launch.arguments) if x is not None}
            if touched & behind:
                upstream.insert(0, launch)
                behind |= touched - given
        sound = {_memory(x) for x in right} - {_memory(wrong)}
        suspects = [
            launch
            for launch in upstream
            if not sound & {_memory(x) for x in map(tensor_of, launch.arguments) if x is not None}
        ]
        return ", ".join(dict.fromkeys(x.name for x in suspects or upstream[-1:] or kernels))


class LayerCheck(Check):
    """A layer's two passes on the data of a step.

    Args:
        name: of the layer.
        one: its pass, of a chain whose exchange is a loopback.
        verdict: is filled in.
    """

    def __init__(self, name: str, one: Pass, verdict: Verdict) -> None:
        super().__init__(name, verdict)
        self.one, self._kernels = one, has_kernels(one)
        self._w: Tensor | None = None
        self._b: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Check the forward pass on ``x``; the output, float64's where the kernels' is wrong."""
        one, self._given = self.one, x
        if not self._kernels:
            return one.forward(x)
        self._x = both_halves(one, x)
        if isinstance(one, (Convolution, FullyConnected)):
            bias = one.update.bias()
            self._w, self._b = one.update.weight().clone(), None if bias is None else bias.clone()
        expected = expected_output(one, self._x, self._w, self._b)
        found = self.run("forward", lambda: [one.forward(x)], lambda: None, x)
        self.hold("forward", found, {"output": (expected, self._bound())})
        y = found[0] if found and self.verdict.wrong is None else None
        self._y = expected.to(x.dtype).contiguous() if y is None else y
        return self._y

    def backward(self, dy: Tensor, partials: Tensor | None) -> Gradient:
        """Check the backward pass on ``dy``; what the layer below gets, as float64 has it."""
        one = self.one
        if not self._kernels:
            return one.backward(dy, partials)
        if isinstance(one, Pool):
            dy = dy * one_maximum(one, self._x)
        self._dy = dy
        dx, dw, db = self._gradients(dy)
        expected: dict[str, tuple[Tensor, float]] = {}
        mine = sums = None
        if dx is not None:
            mine, rows = own_half(one, dx), self._x.numel() // self._x.shape[-1]
            sums = dx.flatten(0, -2).sum(0)
            expected["gradient of the input"] = (mine, self._bound())
            expected[_SUMMED[0]] = (sums, self._bound(rows))
        restore: Callable[[], None] = lambda: None  # noqa: E731
        if isinstance(one, (Convolution, FullyConnected)):
            restore = self._expect_updates(expected, one, (dw, db))
        if self.verdict.wrong is None:
            inputs = (dy, partials, self._x)
            found = self.run("backward", lambda: self._results(dy, partials), restore, *inputs)
            self.hold("backward", found, expected)
        if mine is None or sums is None:
            return None, None
        # Sums go along where a kernel has them: it undid the ReLU below, and no half was sent away.
        below = one.masks_dx and mine.dim() == 4 and mine.shape == self._x.shape
        return mine.to(dy.dtype).contiguous(), sums.float()[None] if below else None

    def _bound(self, rows: int = 0) -> float:
        """The relative error that a result may have, for the longest of the layer's sums."""
        if self._w is not None:
            inputs = self._w[..., 0].numel() if self._w.dim() == 4 else self._w.shape[1]
            outputs = self._w.numel() // inputs
            rows = max(rows, inputs, outputs, self._x.numel() // self._x.shape[-1])
        kernel = "conv2d" if isinstance(self.one, Convolution) else "linear"
        precision = "ieee" if self._w is None else dot_precision(self._x, kernel)
        return tolerance(self._x.dtype, rows, precision)

    def _gradients(self, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Those of input, packed weight and bias in float64, before any update."""
        one, dz = self.one, dy.double()
        if one.relu and not one.dy_is_preact:
            dz = torch.where(self._y <= 0, 0.0, dz)
        module = getattr(one, "module", None)
        if isinstance(module, LinearReLUDropout) and module.training:
            dz = dz / (1.0 - module.p)
        dx, dw, db = expected_gradients(one, self._x, self._w, self._b, dz)
        if dx is not None and one.masks_dx:
            dx = torch.where(self._x <= 0, 0.0, dx)
        return dx, dw, db

    def _expect_updates(
        self,
        expected: dict[str, tuple[Tensor, float]],
        one: Convolution | FullyConnected,
        gradients: tuple[Tensor | None, ...],
    ) -> Callable[[], None]:
        """Add what the updates should come to; returns what sets parameters and momentum back.

        Rates and momentum are chosen so that no part of the rule drowns another.
        """
        update, bound = one.update, self._bound()
        before: list[tuple[Tensor, Tensor]] = []
        for kind, of, gradient in zip(("weight", "bias"), update.updates, gradients, strict=True):
            if of is None or gradient is None:
                continue
            w, g = of.parameter.detach(), as_parameter(gradient, of.parameter)
            if isinstance(update, StoredGradients):
                expected[f"gradient of the {kind}"] = (g, bound)
                continue
            size, step = float(w.norm()) or 1.0, float(g.norm()) or 1.0
            of.rate = torch.tensor([size / step, 0.5, step / size / 4], device=w.device)
            of.buffer.copy_(g.roll(1, 0))
            twin = MomentumUpdate(w.clone(), of.buffer.clone(), of.rate, of.rule)
            twin.apply(g)
            assert twin.squares is not None
            before += [(x, x.clone()) for x in (w, of.buffer, of.operand) if x is not None]
            expected[kind] = (twin.parameter, bound)
            expected[f"momentum of the {kind}"] = (twin.buffer, bound)
            expected[f"squared norm of the {kind}'s gradient"] = (twin.squares.sum(), 2 * bound)
            if of.operand is not None:
                copy = twin.parameter if of.pack is None else of.pack(twin.parameter)
                narrow = tolerance(of.operand.dtype, 0)
                expected[f"copy of the {kind}"] = (copy, max(bound, narrow))

        def restore() -> None:
            for x, value in before:
                x.copy_(value)

        return restore

    def _results(self, dy: Tensor, partials: Tensor | None) -> list[Tensor | None]:
        """What a backward pass makes and changes, in the order in which it is expected."""
        dx, below = self.one.backward(dy, partials)
        results = [dx, below] if self.one.needs_dx else []
        update = getattr(self.one, "update", None)
        if isinstance(update, StoredGradients):
            return [*results, *update.gradients]
        for of in update.updates if update is not None else ():
            if of is not None:
                results += [of.parameter.detach(), of.buffer, of.squares]
                results += [] if of.operand is None else [of.operand]
        return results

    def time(self, rival: Pass, images: Tensor | None, clock: Clock) -> None:
        """Time both passes beside those of ATen's ``rival``, which may read ``images`` instead."""
        x = self._given if images is None else images
        aten = Program([x])
        with aten.recording():
            rival.forward(x)
            rival.backward(self._dy, None)

        def ours() -> None:
            for program in self.programs:
                program.run()

        seconds = take_turns({"ours": ours, "aten": aten.run}, clock, _ROUNDS)
        self.verdict.ours, self.verdict.aten = map(statistics.median, seconds.values())


def check_function(
    name: str, verdict: Verdict, make: Callable[[], Sequence[Tensor]], expected: Sequence[Tensor]
) -> None:
    """Check what launches kernels and is no layer: augmentation, or the loss."""
    check = Check(name, verdict)
    found = check.run("forward", make, lambda: None, expected[0])
    dtypes = [x.dtype for x in found if x is not None]
    bounds = [(x, tolerance(kind, 0)) for x, kind in zip(expected, dtypes, strict=bool(found))]
    check.hold("forward", found, {f"result {i + 1}": x for i, x in enumerate(bounds)})


def check_layers(
    passes: Sequence[tuple[str, Pass]],
    verdicts: Mapping[str, Verdict],
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
) -> list[LayerCheck]:
    """Go through a step's layers, forward and backward, and check each.

    Args:
        passes: of a chain whose exchange is a loopback; the parameters change.
        verdicts: by layer, are filled in.
        x: what the first layer reads.
        loss: makes the gradient of the logits from them.

    Returns:
        The layers with kernels.
    """
    checks = [LayerCheck(name, one, verdicts.get(name, Verdict())) for name, one in passes]
    for layer in checks:
        x = layer.forward(x)
    dy: Tensor | None = loss(x)
    partials: Tensor | None = None
    for layer in reversed(checks):
        assert dy is not None
        dy, partials = layer.backward(dy, partials)
    return [layer for layer in checks if has_kernels(layer.one)]


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fill what is allocated with NaN, so that an element that nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        settings.fill_uninitialized_memory = filled


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or bool((one.isnan() & other.isnan() | (one == other)).all())


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _check_gpu(names: str) -> None:
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        raise UnusableGPU(f"{names} left the GPU unusable: {line}; {REPORT}") from error
